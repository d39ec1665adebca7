"""A FAISS index over the features: which texts help THIS problem?"""

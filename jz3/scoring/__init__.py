"""`jz3 score`: a corpus that doesn't fit into memory, scored in one pass by workers that may die."""

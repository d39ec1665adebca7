// jz3._C: the CPU kernels for Python. Arrays come as addresses and sizes, so that one binary serves every
// version of torch and numpy; shapes and types are checked by jz3/ops before.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/ops.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

#ifdef JZ3_BF16
// The parts of a Llama block for one type of rows.
template <class T>
void bind_block(py::module_& module, const std::string& type) {
  auto m = [&](const char* name) { return (std::string(name) + "_" + type); };
  module.def(m("rms_norm").c_str(), [](uintptr_t x, uintptr_t add, uintptr_t weight, uintptr_t sum, uintptr_t y,
                                       uintptr_t scale, int64_t rows, int64_t width, float epsilon, int threads) {
    py::gil_scoped_release release;
    jz3::rms_norm<T>({at<const float>(x), at<const T>(add), at<const T>(weight), at<float>(sum), at<T>(y),
                      at<float>(scale), rows, width, epsilon},
                     threads);
  });
  module.def(m("rms_norm_backward").c_str(),
             [](uintptr_t x, uintptr_t weight, uintptr_t dy, uintptr_t add, uintptr_t scale, uintptr_t dx,
                int64_t rows, int64_t width, int threads) {
               py::gil_scoped_release release;
               jz3::rms_norm_backward<T>({at<const float>(x), at<const T>(weight), at<const T>(dy), at<const T>(add),
                                          at<const float>(scale), at<T>(dx), rows, width},
                                         threads);
             });
  module.def(m("swiglu").c_str(), [](uintptr_t gate_up, uintptr_t y, int64_t rows, int64_t width, int threads) {
    py::gil_scoped_release release;
    jz3::swiglu(at<const T>(gate_up), at<T>(y), rows, width, threads);
  });
  module.def(m("swiglu_backward").c_str(),
             [](uintptr_t gate_up, uintptr_t dy, uintptr_t out, int64_t rows, int64_t width, int threads) {
               py::gil_scoped_release release;
               jz3::swiglu_backward(at<const T>(gate_up), at<const T>(dy), at<T>(out), rows, width, threads);
             });
  module.def(m("attention").c_str(),
             [](uintptr_t qkv, uintptr_t cosine, uintptr_t sine, uintptr_t out, uintptr_t statistics, uintptr_t dout,
                uintptr_t dqkv, int64_t texts, int64_t tokens, int64_t heads, int64_t key_heads, int64_t width,
                float scale, int threads) {
               py::gil_scoped_release release;
               const jz3::AttentionArguments<T> arguments{
                   at<const T>(qkv), at<const float>(cosine), at<const float>(sine), at<T>(out), at<float>(statistics),
                   at<const T>(dout), at<T>(dqkv), texts, tokens, heads, key_heads, width, scale};
               if (dout)
                 jz3::attention_backward(arguments, threads);
               else
                 jz3::attention(arguments, threads);
             });
  module.def(m("softmax_residual").c_str(), [](uintptr_t logits, uintptr_t target, uintptr_t loss, uintptr_t total,
                                               int64_t rows, int64_t width, int64_t stride, int threads) {
    py::gil_scoped_release release;
    jz3::softmax_residual<T>(
        {at<T>(logits), at<const int64_t>(target), at<float>(loss), at<float>(total), rows, width, stride}, threads);
  });
  module.def(m("cross_entropy").c_str(), [](uintptr_t h, uintptr_t w, uintptr_t forward, uintptr_t backward, uintptr_t target,
                                            uintptr_t weight, uintptr_t loss, uintptr_t rest, uintptr_t grad, int64_t rows,
                                            int64_t words, int64_t width, int bits, int64_t forward_group, int64_t backward_group,
                                            int threads) {
    py::gil_scoped_release release;
    jz3::cross_entropy<T>({at<const T>(h), at<const T>(w), at<const void>(forward), at<const void>(backward),
                           at<const int64_t>(target), at<const float>(weight), at<float>(loss), at<float>(rest), at<T>(grad),
                           rows, words, width, bits, forward_group, backward_group},
                          threads);
  });
}

// Products of rows of T with results of Out.
template <class T, class Out>
void bind_product(py::module_& module, const std::string& types) {
  module.def(("product_" + types).c_str(), [](uintptr_t x, uintptr_t w, uintptr_t signs, uintptr_t y, int64_t rows,
                                              int64_t columns, int64_t depth, int64_t x_stride, int64_t y_stride,
                                              int64_t first, int threads) {
    py::gil_scoped_release release;
    const jz3::ProductArguments<T, Out> arguments{at<const T>(x), at<const void>(w), at<const T>(signs), at<Out>(y), rows,
                                                  columns, depth, x_stride, y_stride, first};
    jz3::product(arguments, threads);
  });
}
template <class T, class Unit>
void bind_packing(py::module_& module, const std::string& type) {
  module.def(("pack_product_" + type).c_str(), [](uintptr_t w, uintptr_t out, int64_t depth, int64_t columns,
                                                  int64_t row_stride, int64_t column_stride, int threads) {
    py::gil_scoped_release release;
    jz3::pack_product(at<const T>(w), at<Unit>(out), depth, columns, row_stride, column_stride, threads);
  });
}

// Products with whole numbers, of one width and type of rows.
template <class T>
void bind_whole(py::module_& module, const std::string& width, const std::string& type,
                void (*pack)(const T*, uint8_t*, const jz3::WholeShape&, int),
                void (*product)(const jz3::WholeArguments<T>&, int)) {
  module.def(("pack_" + width + "_" + type).c_str(),
             [pack](uintptr_t w, uintptr_t out, int64_t group, int64_t depth, int64_t columns, int64_t row_stride,
                    int64_t column_stride, int threads) {
               py::gil_scoped_release release;
               pack(at<const T>(w), at<uint8_t>(out), {group, depth, columns, row_stride, column_stride}, threads);
             });
  module.def(("product_" + width + "_" + type).c_str(),
             [product](uintptr_t x, uintptr_t w, uintptr_t y, int64_t group, int64_t rows, int64_t columns, int64_t depth,
                       int64_t x_stride, int64_t y_stride, int threads) {
               py::gil_scoped_release release;
               product({at<const T>(x), at<const uint8_t>(w), at<T>(y), group, rows, columns, depth, x_stride, y_stride},
                       threads);
             });
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("cpu_features", [] { return std::string(jz3::isa_name(jz3::choose_isa(-1))); });
  m.def("isa_name", [](int isa) { return std::string(jz3::isa_name(jz3::choose_isa(isa))); });
  m.def("hold_memory", &jz3::hold_memory);
  m.def("tile_unit", [] { return int(jz3::tile_unit()); });
  m.def("choose_tile_unit", &jz3::choose_tile_unit);
  m.def("peak_int8", [](int isa, int threads, double seconds) {
    py::gil_scoped_release release;
    return jz3::peak_int8(isa, threads, seconds);
  });
  m.def("read_all", [](uintptr_t bytes, int64_t count, int threads) {
    py::gil_scoped_release release;
    return jz3::read_all(at<const uint8_t>(bytes), count, threads);
  });
  m.def("sign_bits",
        [](uintptr_t out, uint64_t key, int64_t rows, int64_t blocks, uint64_t first_row, uint64_t first_block,
           int threads) {
          py::gil_scoped_release release;
          jz3::sign_bits(at<uint32_t>(out), key, rows, blocks, first_row, first_block, threads);
        });
  m.def("sign_matrix",
        [](uintptr_t out, uint64_t key, int64_t rows, int64_t cols, uint64_t first_row, uint64_t first_block,
           int threads) {
          py::gil_scoped_release release;
          jz3::sign_matrix(at<float>(out), key, rows, cols, first_row, first_block, threads);
        });
  m.def("has_sign_project", &jz3::has_sign_project);
  m.def("sign_project", [](uintptr_t x, uintptr_t out, uint64_t key, uint64_t first_block, int64_t rows,
                           int64_t columns, int64_t k, int64_t stride, int threads) {
    py::gil_scoped_release release;
    jz3::sign_project({at<const float>(x), at<float>(out), key, first_block, rows, columns, k, stride}, threads);
  });
  m.def("sketch", [](uintptr_t block, uintptr_t out, bool is_bfloat16, int64_t rows, int64_t n, int64_t row_stride,
                     uint64_t key, int64_t dim, int threads) {
    py::gil_scoped_release release;
    if (is_bfloat16)
      jz3::sketch(at<const uint16_t>(block), at<float>(out), rows, n, row_stride, key, dim, threads);
    else
      jz3::sketch(at<const float>(block), at<float>(out), rows, n, row_stride, key, dim, threads);
  });
  m.def("encode", [](uintptr_t values, uintptr_t mean, uintptr_t scale, uintptr_t thresholds, uintptr_t codes,
                     int64_t rows, int64_t dim, int64_t row_bytes, int bits, float unit, float smallest_scale,
                     int threads) {
    py::gil_scoped_release release;
    jz3::encode({at<const float>(values), at<const float>(mean), at<const float>(scale), at<const float>(thresholds),
                 at<uint8_t>(codes), rows, dim, row_bytes, bits, unit, smallest_scale},
                threads);
  });
  m.def("decode", [](uintptr_t codes, uintptr_t mean, uintptr_t scale, uintptr_t table, uintptr_t values,
                     int64_t rows, int64_t dim, int64_t row_bytes, int bits, int threads) {
    py::gil_scoped_release release;
    jz3::decode(at<const uint8_t>(codes), at<const float>(mean), at<const float>(scale), at<const float>(table),
                at<float>(values), rows, dim, row_bytes, bits, threads);
  });
  m.def("score_topk", [](uintptr_t codes, uintptr_t begins, uintptr_t levels, uintptr_t planes, uintptr_t step,
                         uintptr_t bias, uintptr_t row_scale, uintptr_t ids, uintptr_t groups, uintptr_t values,
                         uintptr_t found, int64_t pieces, int64_t rows, int64_t dim, int64_t row_bytes, int64_t stride,
                         int64_t queries, int64_t count, int64_t k, int planes_count, int bits, int isa, int threads) {
    py::gil_scoped_release release;
    jz3::score_topk({at<const uint8_t* const>(codes), at<const int64_t>(begins), at<const int8_t>(levels),
                     at<const int8_t>(planes), at<const double>(step), at<const double>(bias),
                     at<const float>(row_scale), at<const int64_t>(ids), at<const int64_t>(groups), at<float>(values),
                     at<int64_t>(found), nullptr, pieces, rows, dim, row_bytes, stride, queries, count, k, planes_count,
                     bits, isa},
                    threads);
  });
  m.def("score_codes", [](uintptr_t codes, uintptr_t levels, uintptr_t planes, uintptr_t step, uintptr_t bias,
                          uintptr_t row_scale, uintptr_t scores, int64_t rows, int64_t dim, int64_t row_bytes,
                          int64_t stride, int64_t queries, int planes_count, int bits, int isa, int threads) {
    py::gil_scoped_release release;
    const auto* const whole = at<const uint8_t>(codes);
    const int64_t begins[] = {0, rows};
    jz3::score_codes({&whole, begins, at<const int8_t>(levels), at<const int8_t>(planes), at<const double>(step),
                      at<const double>(bias), at<const float>(row_scale), nullptr, nullptr, nullptr, nullptr,
                      at<float>(scores), 1, rows, dim, row_bytes, stride, queries, 0, 0, planes_count, bits, isa},
                     threads);
  });
#ifdef JZ3_BF16
  m.def("segment_unit", [] { return int(jz3::best_segment_unit()); });
  m.def(
      "segment_project",
      [](uintptr_t a, uintptr_t g, uintptr_t left, uintptr_t out, uintptr_t bounds, uintptr_t tokens,
         int64_t documents, int64_t width, int64_t outputs, int64_t columns, int64_t stride_a, int64_t stride_g,
         int64_t stride_left, float scale, bool signs, bool bf16, int unit, int threads) {
        py::gil_scoped_release release;
        jz3::segment_project({at<void>(a), at<void>(g), at<void>(left), at<float>(out), at<const int64_t>(bounds),
                              at<const int64_t>(tokens), documents, width, outputs, columns, stride_a, stride_g,
                              stride_left, scale, signs, bf16},
                             unit, threads);
      },
      py::kw_only(), py::arg("a"), py::arg("g"), py::arg("left"), py::arg("out"), py::arg("bounds"),
      py::arg("tokens"), py::arg("documents"), py::arg("width"), py::arg("outputs"), py::arg("columns"),
      py::arg("stride_a"), py::arg("stride_g"), py::arg("stride_left"), py::arg("scale"), py::arg("signs"),
      py::arg("bf16"), py::arg("unit"), py::arg("threads"));
  m.def("vector_unit", [] { return int(jz3::vector_unit()); });
  m.def("choose_vector_unit", &jz3::choose_vector_unit);
  m.def("has_int8_products", &jz3::has_int8_products);
  m.def("has_int16_products", &jz3::has_int16_products);
  m.def("int8_bytes", &jz3::int8_bytes);
  m.def("int16_bytes", &jz3::int16_bytes);
  m.attr("INT8_PANEL") = jz3::INT8_PANEL;
  m.attr("INT16_PANEL") = jz3::INT16_PANEL;
  m.attr("BUCKETS") = jz3::BUCKETS;
  for (const bool backward : {false, true})
    m.def(backward ? "gated_gradient_product" : "gated_product",
          [backward](uintptr_t x, uintptr_t w, uintptr_t gate_up, uintptr_t y, int64_t rows, int64_t depth, int64_t width,
                     int64_t x_stride, int threads) {
            py::gil_scoped_release release;
            const jz3::GatedArguments arguments{
                at<const uint16_t>(x), at<const uint32_t>(w), at<uint16_t>(gate_up), at<uint16_t>(y), rows, depth, width, x_stride};
            if (backward)
              jz3::gated_gradient_product(arguments, threads);
            else
              jz3::gated_product(arguments, threads);
          });
  m.def("project_segments", [](uintptr_t g, uintptr_t g_sketch, uintptr_t a, uintptr_t a_sketch, uintptr_t bounds,
                               uintptr_t turn_left, uintptr_t turn_right, uintptr_t chosen, uintptr_t square,
                               uintptr_t values, int64_t segments, int64_t rows, int64_t columns, int64_t count,
                               int64_t g_stride, int64_t a_stride, int64_t values_stride, int threads) {
    py::gil_scoped_release release;
    jz3::project_segments(
        {at<const float>(g), at<const float>(g_sketch), at<const float>(a), at<const float>(a_sketch),
         at<const int64_t>(bounds), at<const float>(turn_left), at<const float>(turn_right), at<const int64_t>(chosen),
         at<float>(square), at<float>(values), segments, rows, columns, count, g_stride, a_stride, values_stride},
        threads);
  });
  bind_block<float>(m, "float32");
  bind_block<uint16_t>(m, "bfloat16");
  bind_packing<float, float>(m, "float32");
  bind_packing<uint16_t, uint32_t>(m, "bfloat16");
  bind_product<float, float>(m, "float32_float32");
  bind_product<uint16_t, float>(m, "bfloat16_float32");
  bind_product<uint16_t, uint16_t>(m, "bfloat16_bfloat16");
  bind_whole<float>(m, "int8", "float32", jz3::pack_int8, jz3::product_int8);
  bind_whole<uint16_t>(m, "int8", "bfloat16", jz3::pack_int8, jz3::product_int8);
  bind_whole<float>(m, "int16", "float32", jz3::pack_int16, jz3::product_int16);
#endif
}

// pmc_fast's CUDA module for Python: addresses of tensors on the current device, as in bindings.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "decode_attention_cuda.h"

namespace py = pybind11;

namespace {

template <typename T>
pmc::DecodeAttention<T> arguments(const py::tuple& q, const py::tuple& k, const py::tuple& v,
                                  uintptr_t k_pool, uintptr_t v_pool, uintptr_t out, const py::tuple& shape,
                                  double scale, double softcap, int64_t window, const py::tuple& index) {
  const auto address = [](const py::tuple& t) { return reinterpret_cast<T*>(t[0].cast<uintptr_t>()); };
  const auto number = [](const py::tuple& t, int i) { return t[i].cast<int64_t>(); };
  const auto array = [&](int i) { return reinterpret_cast<const int32_t*>(index[i].cast<uintptr_t>()); };
  return {address(q),
          address(k),
          address(v),
          number(q, 1),
          number(q, 2),
          number(k, 1),
          number(k, 2),
          number(v, 1),
          number(v, 2),
          reinterpret_cast<T*>(k_pool),
          reinterpret_cast<T*>(v_pool),
          reinterpret_cast<T*>(out),
          number(shape, 0),
          number(shape, 1),
          number(shape, 2),
          scale,
          softcap,
          window,
          {array(0), array(1), array(2), array(3), array(4), array(5), array(6), number(index, 7),
           number(index, 8)}};
}

// Launches keep the GIL: one takes less time than releasing and acquiring it.
template <typename T>
void decode_attention(py::tuple q, py::tuple k, py::tuple v, uintptr_t k_pool, uintptr_t v_pool,
                      uintptr_t out, py::tuple shape, double scale, double softcap, int64_t window,
                      py::tuple index, uintptr_t stream) {
  pmc::decode_attention(arguments<T>(q, k, v, k_pool, v_pool, out, shape, scale, softcap, window, index),
                        reinterpret_cast<cudaStream_t>(stream));
}

void decode_attention_mma(py::tuple q, py::tuple k, py::tuple v, uintptr_t k_pool, uintptr_t v_pool,
                          uintptr_t out, py::tuple shape, double scale, double softcap, int64_t window,
                          py::tuple index, uintptr_t stream, int64_t tile_rows) {
  pmc::decode_attention_mma(
      arguments<pmc::BFloat16>(q, k, v, k_pool, v_pool, out, shape, scale, softcap, window, index), tile_rows,
      reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "pmc_fast's CUDA C++";
  m.def("decode_attention_f32", &decode_attention<float>);
  m.def("decode_attention_f64", &decode_attention<double>);
  m.def("decode_attention_bf16", &decode_attention<pmc::BFloat16>);
  m.def("decode_attention_mma_bf16", &decode_attention_mma);
  m.def("decode_attention_block", &pmc::decode_attention_block, py::arg("dim"), py::arg("size"));
  m.def("decode_attention_mma_block", &pmc::decode_attention_mma_block, py::arg("dim"));
}

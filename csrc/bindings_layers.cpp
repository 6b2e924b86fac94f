// What Python sees of a model's layers. Tensors come as addresses: pmc_fast.ops has checked them.
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "gemm.h"
#include "layers.h"
#include "linear.h"

namespace py = pybind11;

namespace pmc {

void check_isa(int isa) {
  if (isa < 0 || isa > static_cast<int>(best_isa())) {
    throw std::invalid_argument("isa " + std::to_string(isa) + " is not to be had on this processor");
  }
}

namespace {

void bound_linear(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t y, int64_t rows, int64_t in,
                  int64_t out, int threads) {
  check_isa(static_cast<int>(Isa::kAvx512));
  const Linear args{reinterpret_cast<const float*>(x),
                    reinterpret_cast<const float*>(weight),
                    reinterpret_cast<const float*>(bias),
                    reinterpret_cast<float*>(y),
                    rows,
                    in,
                    out};
  py::gil_scoped_release nogil;
  linear(args, threads);
}

void bound_gemm(uintptr_t a, uintptr_t b, uintptr_t bias, uintptr_t c, py::tuple sizes, py::tuple strides,
                bool a_turned, bool b_turned, bool add, int threads) {
  check_isa(static_cast<int>(Isa::kAvx512));
  const auto number = [](const py::tuple& t, int i) { return t[i].cast<int64_t>(); };
  const Gemm args{reinterpret_cast<const float*>(a),
                  reinterpret_cast<const float*>(b),
                  reinterpret_cast<const float*>(bias),
                  reinterpret_cast<float*>(c),
                  number(sizes, 0),
                  number(sizes, 1),
                  number(sizes, 2),
                  number(strides, 0),
                  number(strides, 1),
                  number(strides, 2),
                  a_turned,
                  b_turned,
                  add};
  py::gil_scoped_release nogil;
  gemm(args, threads);
}

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

void bound_rms_norm(uintptr_t x, uintptr_t weight, uintptr_t y, uintptr_t rstd, int64_t rows, int64_t size,
                    float eps, float offset, int isa, int threads) {
  check_isa(isa);
  const RmsNorm args{floats(x), floats(weight), floats(y), rows, size, eps, offset, floats(rstd)};
  py::gil_scoped_release nogil;
  rms_norm(args, static_cast<Isa>(isa), threads);
}

void bound_rms_norm_backward(uintptr_t dy, uintptr_t x, uintptr_t weight, uintptr_t rstd, uintptr_t dx,
                             uintptr_t dweight, int64_t rows, int64_t size, float offset, int isa,
                             int threads) {
  check_isa(isa);
  const RmsNormBackward args{floats(dy),      floats(x), floats(weight), floats(rstd), floats(dx),
                             floats(dweight), rows,      size,           offset};
  py::gil_scoped_release nogil;
  rms_norm_backward(args, static_cast<Isa>(isa), threads);
}

void bound_silu_mul(uintptr_t gate, uintptr_t up, uintptr_t y, int64_t size, int isa, int threads) {
  check_isa(isa);
  const SiluMul args{floats(gate), floats(up), floats(y), size};
  py::gil_scoped_release nogil;
  silu_mul(args, static_cast<Isa>(isa), threads);
}

void bound_silu_mul_backward(uintptr_t dy, uintptr_t gate, uintptr_t up, uintptr_t dgate, uintptr_t dup,
                             int64_t size, int isa, int threads) {
  check_isa(isa);
  const SiluMulBackward args{floats(dy), floats(gate), floats(up), floats(dgate), floats(dup), size};
  py::gil_scoped_release nogil;
  silu_mul_backward(args, static_cast<Isa>(isa), threads);
}

void bound_rotary(uintptr_t x, uintptr_t cos, uintptr_t sin, uintptr_t y, int64_t rows, int64_t heads,
                  int64_t dim, int64_t row_stride, int64_t head_stride, bool back, int isa, int threads) {
  check_isa(isa);
  const Rotary args{floats(x), floats(cos), floats(sin), floats(y),   rows,
                    heads,     dim,         row_stride,  head_stride, back};
  py::gil_scoped_release nogil;
  rotary(args, static_cast<Isa>(isa), threads);
}

}  // namespace

void bind_layers(py::module_& m) {
  m.def("linear_f32", &bound_linear);
  m.def("gemm_f32", &bound_gemm);
  m.def("rms_norm_f32", &bound_rms_norm);
  m.def("rms_norm_backward_f32", &bound_rms_norm_backward);
  m.def("silu_mul_f32", &bound_silu_mul);
  m.def("silu_mul_backward_f32", &bound_silu_mul_backward);
  m.def("rotary_f32", &bound_rotary);
}

}  // namespace pmc

// Python bindings of a model's layers. Tensors come as addresses, which pmc_fast.ops has checked.
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "checks.h"
#include "layers.h"
#include "linear.h"

namespace py = pybind11;

namespace pmc {

void check_isa(int isa) {
  if (isa < 0 || isa > static_cast<int>(best_isa())) {
    throw std::invalid_argument("isa " + std::to_string(isa) + " is not supported by this processor");
  }
}

namespace {

Memory floats_of(const char* name, uintptr_t address, int64_t rows, int64_t size, int64_t stride) {
  return memory_of(name, address, sizeof(float), rows, size, stride);
}
Memory floats_of(const char* name, uintptr_t address, int64_t size) {
  return memory_of(name, address, sizeof(float), size);
}
// An optional array: address 0 and no size if it is left out.
Memory optional_of(const char* name, uintptr_t address, int64_t size) {
  return floats_of(name, address, address ? size : 0);
}
// As check_apart, but the two may be the same array.
void check_same_or_apart(const Memory& written, std::initializer_list<Memory> others) {
  for (const Memory& other : others) {
    if (other.address != written.address || other.bytes != written.bytes) check_apart(written, {other});
  }
}

void bound_linear(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t y, int64_t rows, int64_t in,
                  int64_t out, int isa, int threads) {
  check_isa(isa);
  if (isa == static_cast<int>(Isa::kGeneric)) throw py::value_error("linear_f32 needs AVX2 or AVX-512");
  check_threads(threads);
  check_apart(floats_of("y", y, rows, out, out),
              {floats_of("x", x, rows, in, in), optional_of("bias", bias, out),
               floats_of("weight", weight, out, in, in)});
  const Linear args{reinterpret_cast<const float*>(x),
                    reinterpret_cast<const float*>(weight),
                    reinterpret_cast<const float*>(bias),
                    reinterpret_cast<float*>(y),
                    rows,
                    in,
                    out};
  py::gil_scoped_release nogil;
  linear(args, static_cast<Isa>(isa), threads);
}

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

void bound_rms_norm(uintptr_t x, uintptr_t weight, uintptr_t y, uintptr_t rstd, int64_t rows, int64_t size,
                    float eps, float offset, int isa, int threads) {
  check_isa(isa);
  check_threads(threads);
  const Memory read = floats_of("x", x, rows, size, size), weights = floats_of("weight", weight, size);
  const Memory written = floats_of("y", y, rows, size, size), inverses = optional_of("rstd", rstd, rows);
  check_same_or_apart(written, {read});
  check_apart(written, {weights, inverses});
  check_apart(inverses, {read, weights});
  const RmsNorm args{floats(x), floats(weight), floats(y), rows, size, eps, offset, floats(rstd)};
  py::gil_scoped_release nogil;
  rms_norm(args, static_cast<Isa>(isa), threads);
}

void bound_rms_norm_backward(uintptr_t dy, uintptr_t x, uintptr_t weight, uintptr_t rstd, uintptr_t dx,
                             uintptr_t dweight, int64_t rows, int64_t size, float offset, int isa,
                             int threads) {
  check_isa(isa);
  check_threads(threads);
  const Memory grads = floats_of("dy", dy, rows, size, size), read = floats_of("x", x, rows, size, size);
  const Memory weights = floats_of("weight", weight, size), inverses = floats_of("rstd", rstd, rows);
  const Memory out = optional_of("dx", dx, product_of("dx", {rows, size}));
  const Memory sums = optional_of("dweight", dweight, size);
  check_apart(out, {grads, read, weights, inverses, sums});
  check_apart(sums, {grads, read, weights, inverses});
  const RmsNormBackward args{floats(dy),      floats(x), floats(weight), floats(rstd), floats(dx),
                             floats(dweight), rows,      size,           offset};
  py::gil_scoped_release nogil;
  rms_norm_backward(args, static_cast<Isa>(isa), threads);
}

void bound_silu_mul(uintptr_t gate, uintptr_t up, uintptr_t y, int64_t size, int isa, int threads) {
  check_isa(isa);
  check_threads(threads);
  check_same_or_apart(floats_of("y", y, size), {floats_of("gate", gate, size), floats_of("up", up, size)});
  const SiluMul args{floats(gate), floats(up), floats(y), size};
  py::gil_scoped_release nogil;
  silu_mul(args, static_cast<Isa>(isa), threads);
}

void bound_silu_mul_backward(uintptr_t dy, uintptr_t gate, uintptr_t up, uintptr_t dgate, uintptr_t dup,
                             int64_t size, int isa, int threads) {
  check_isa(isa);
  check_threads(threads);
  const Memory grads = floats_of("dy", dy, size), gates = floats_of("gate", gate, size);
  const Memory ups = floats_of("up", up, size), of_up = optional_of("dup", dup, size);
  check_apart(optional_of("dgate", dgate, size), {grads, gates, ups, of_up});
  check_apart(of_up, {grads, gates, ups});
  const SiluMulBackward args{floats(dy), floats(gate), floats(up), floats(dgate), floats(dup), size};
  py::gil_scoped_release nogil;
  silu_mul_backward(args, static_cast<Isa>(isa), threads);
}

void bound_rotary(uintptr_t x, uintptr_t cos, uintptr_t sin, uintptr_t y, int64_t rows, int64_t heads,
                  int64_t dim, int64_t row_stride, int64_t head_stride, bool back, int isa, int threads) {
  check_isa(isa);
  check_threads(threads);
  if (dim % 2) throw std::invalid_argument("dim must be even");
  const int64_t wide = product_of("y", {heads, dim});
  check_apart(floats_of("y", y, rows, wide, wide),
              {memory_of("x", x, sizeof(float), rows, heads, dim, row_stride, head_stride),
               floats_of("cos", cos, rows, dim, dim), floats_of("sin", sin, rows, dim, dim)});
  const Rotary args{floats(x), floats(cos), floats(sin), floats(y),   rows,
                    heads,     dim,         row_stride,  head_stride, back};
  py::gil_scoped_release nogil;
  rotary(args, static_cast<Isa>(isa), threads);
}

}  // namespace

void bind_layers(py::module_& m) {
  m.def("linear_f32", &bound_linear);
  m.def("rms_norm_f32", &bound_rms_norm);
  m.def("rms_norm_backward_f32", &bound_rms_norm_backward);
  m.def("silu_mul_f32", &bound_silu_mul);
  m.def("silu_mul_backward_f32", &bound_silu_mul_backward);
  m.def("rotary_f32", &bound_rotary);
}

}  // namespace pmc

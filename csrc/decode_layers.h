// What a decode step computes between its matrix products, each in one pass: float32, contiguous rows.
#pragma once

#include <cstdint>

#include "simd.h"

namespace pmc {

// y = x / rms(x) * (weight + offset)
struct RmsNorm {
  const float* x;       // [rows, size]
  const float* weight;  // [size]
  float* y;             // [rows, size]
  int64_t rows, size;
  float eps;     // added to the mean of squares
  float offset;  // 1 for families that store the weight less 1
};

// y = silu(gate) * up
struct SiluMul {
  const float *gate, *up;  // [size]
  float* y;                // [size]; it may be gate
  int64_t size;
};

// y = x * cos + (-second half of x, first half of x) * sin
struct Rotary {
  const float* x;          // [rows, heads, dim], dim contiguous
  const float *cos, *sin;  // [rows, dim]
  float* y;                // [rows, heads, dim], contiguous
  int64_t rows, heads, dim, row_stride, head_stride;
};

void rms_norm(const RmsNorm& args, Isa isa, int threads);
void silu_mul(const SiluMul& args, Isa isa, int threads);
void rotary(const Rotary& args, Isa isa, int threads);

}  // namespace pmc

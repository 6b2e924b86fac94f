// What a model computes between its matrix products, each in one pass: float32, contiguous rows.
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
  float offset;  // 1 for model families that store the weight minus 1
  float* rstd;   // [rows], or null: 1 / rms(x), for the backward pass
};

struct RmsNormBackward {
  const float* dy;      // [rows, size]
  const float* x;       // [rows, size]
  const float* weight;  // [size]
  const float* rstd;    // [rows]
  float* dx;            // [rows, size], or null
  float* dweight;       // [size], or null
  int64_t rows, size;
  float offset;
};

// y = silu(gate) * up
struct SiluMul {
  const float *gate, *up;  // [size]
  float* y;                // [size]; it may be gate
  int64_t size;
};

struct SiluMulBackward {
  const float *dy, *gate, *up;  // [size]
  float *dgate, *dup;           // [size], or null
  int64_t size;
};

// y = x * cos + (-second half of x, first half of x) * sin
struct Rotary {
  const float* x;          // [rows, heads, dim], dim contiguous
  const float *cos, *sin;  // [rows, dim]
  float* y;                // [rows, heads, dim], contiguous
  int64_t rows, heads, dim, row_stride, head_stride;
  bool back;  // the transposed map: x is dy and y is dx
};

void rms_norm(const RmsNorm& args, Isa isa, int threads);
void rms_norm_backward(const RmsNormBackward& args, Isa isa, int threads);
void silu_mul(const SiluMul& args, Isa isa, int threads);
void silu_mul_backward(const SiluMulBackward& args, Isa isa, int threads);
void rotary(const Rotary& args, Isa isa, int threads);

}  // namespace pmc

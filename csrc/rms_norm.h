// x / rms(x) * weight in one pass over each row.
#pragma once

#include <cstdint>

#include "simd.h"

namespace pmc {

struct RmsNorm {
  const float* x;       // [rows, size], contiguous
  const float* weight;  // [size]
  float* y;             // [rows, size], contiguous
  int64_t rows, size;
  float eps;     // added to the mean of squares
  float offset;  // added to the weight: 1 for families that store it less 1
};

void rms_norm(const RmsNorm& args, Isa isa, int threads);

}  // namespace pmc

// x @ weight.T (+ bias) in float32 for x of few rows, on weights as the model holds them.
#pragma once

#include <cstdint>

#include "simd.h"

namespace pmc {

struct Linear {
  const float* x;       // [rows, in], contiguous
  const float* weight;  // [out, in], contiguous
  const float* bias;    // [out], or null
  float* y;             // [rows, out], contiguous
  int64_t rows, in, out;
};

// isa is kAvx2 or kAvx512. Takes any number of rows; of many a BLAS is faster.
void linear(const Linear& args, Isa isa, int threads);

}  // namespace pmc

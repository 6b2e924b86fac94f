// x @ weight.T (+ bias) in float32 for x of few rows, on weights as the model holds them.
#pragma once

#include <cstdint>

namespace pmc {

struct Linear {
  const float* x;       // [rows, in], contiguous
  const float* weight;  // [out, in], contiguous
  const float* bias;    // [out], or null
  float* y;             // [rows, out], contiguous
  int64_t rows, in, out;
};

// Needs AVX-512 (best_isa() == Isa::kAvx512). Takes any number of rows; from about 50 on a BLAS is faster.
void linear(const Linear& args, int threads);

}  // namespace pmc

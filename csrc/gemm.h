// C = op(A) op(B) (+ C or a bias) in float32 for matrices of any size whose rows may lie apart.
#pragma once

#include <cstdint>

namespace pmc {

struct Gemm {
  const float* a;     // [m, k] with rows lda apart; [k, m] if a_turned
  const float* b;     // [k, n] with rows ldb apart; [n, k] if b_turned
  const float* bias;  // [n], or null; not with add
  float* c;           // [m, n] with rows ldc apart
  int64_t m, n, k, lda, ldb, ldc;
  bool a_turned, b_turned;
  bool add;  // to what is in c
};

// Needs AVX-512 (best_isa() == Isa::kAvx512): elsewhere a BLAS is as good.
void gemm(const Gemm& args, int threads);

}  // namespace pmc

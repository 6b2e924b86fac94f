// Rows of logits to log-probabilities of their targets and, in place, to d(loss)/d(logits).
#pragma once

#include <cstdint>

#include "simd.h"

namespace pmc {

// z = softcap * tanh((logits + bias) * logit_scale / softcap) / temperature, without the tanh if
// softcap is 0. Targets cu_targets[r] .. cu_targets[r + 1] belong to row r; each is in [0, vocab).
template <typename T>
struct NllRows {
  T* logits;  // [rows, vocab], rows `stride` apart; overwritten by d(logits), or by scratch
  int64_t stride, rows, vocab;
  const T* bias;  // [vocab] or null
  T temperature, softcap, logit_scale;
  const int64_t* cu_targets;  // [rows + 1]
  const int64_t* targets;     // [cu_targets[rows]]
  const T* row_scale;         // as targets
  T* logps;                   // as targets; out: z[target] - logsumexp(z)
  bool grad;                  // leave d(sum of -row_scale * logps)/d(logits) in logits
};

void nll_rows(const NllRows<float>& args, Isa isa, int threads);
void nll_rows(const NllRows<double>& args, Isa isa, int threads);

}  // namespace pmc

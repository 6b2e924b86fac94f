// Draws from rows of logits: temperature, top-k, top-p, without sorting a row.
#pragma once

#include <cstdint>

#include "simd.h"

namespace pmc {

// Row r's draws are cu_draws[r] .. cu_draws[r + 1]; each is a function of its key (seed, stream,
// sample, position) and of the row's distribution, of nothing else.
template <typename T>
struct SampleNucleus {
  const T* logits;  // [rows, vocab], rows `stride` apart
  int64_t stride, rows, vocab;
  double temperature;  // 0: the first arg-max, whatever top_k and top_p are
  int64_t top_k;       // 0: all; tokens tied with the k-th are kept
  double top_p;        // of what top_k leaves: the fewest likeliest tokens that hold this mass
  uint64_t seed;
  const int64_t* cu_draws;   // [rows + 1]
  const int64_t* streams;    // [draws]
  const int64_t* samples;    // [draws]
  const int64_t* positions;  // [draws]
  int64_t* tokens;           // [draws], out
  double* logps;             // [draws], out: log softmax(logits)[token], at temperature 1, all tokens
  double* mass;              // [rows], out: share of softmax(logits / temperature) that was kept
};

void sample_nucleus(const SampleNucleus<float>& args, Isa isa, int threads);
void sample_nucleus(const SampleNucleus<double>& args, Isa isa, int threads);

}  // namespace pmc

#include "race.h"

#include <cmath>
#include <stdexcept>

#include "avx512.h"
#include "philox.h"

namespace pmc {

#ifdef PMC_X86
namespace {

constexpr int kRounds = 10;
// A bound is an exponential in float, far better than this: what it rules out has certainly lost.
constexpr double kMargin = 1 - 2e-4;

double speed(const Race& row, uint64_t key, uint32_t position, uint32_t sample, int64_t v) {
  const double weight = std::exp((static_cast<double>(row.logits[v]) - row.top) / row.temperature);
  return weight / -std::log(to_uniform(philox(key, static_cast<uint32_t>(v), position, sample, 0)));
}

// The high words of 8 tokens' random numbers, each in the low half of its lane; see philox in philox.h. The
// halves above hold what multiplication ignores.
PMC_AVX512 inline __m512i high_words(__m512i tokens, __m512i position, __m512i sample, const uint32_t* k0,
                                     const uint32_t* k1) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  __m512i c0 = tokens, c1 = position, c2 = sample, c3 = _mm512_setzero_si512();
  for (int round = 0; round < kRounds; ++round) {
    const __m512i a = _mm512_mul_epu32(m0, c0), b = _mm512_mul_epu32(m1, c2);
    const __m512i x = _mm512_xor_si512(c1, _mm512_set1_epi64(k0[round]));
    const __m512i y = _mm512_xor_si512(c3, _mm512_set1_epi64(k1[round]));
    c0 = _mm512_xor_si512(_mm512_srli_epi64(b, 32), x);
    c1 = b;
    c2 = _mm512_xor_si512(_mm512_srli_epi64(a, 32), y);
    c3 = a;
  }
  return c1;
}

}  // namespace

PMC_AVX512 void race_bounds(const Race& row) {
  row_sum_exp(row.logits, row.vocab, static_cast<float>(row.top), static_cast<float>(1 / row.temperature),
              row.bounds);
}

// As E_v = -log(u) >= 1 - u, a token whose weight is below best * (1 - u) has lost; the high word of the
// random number alone bounds 1 - u from below.
PMC_AVX512 int64_t race(const Race& row, uint64_t key, uint32_t position, uint32_t sample) {
  uint32_t k0[kRounds], k1[kRounds];
  for (uint32_t i = 0; i < kRounds; ++i) {
    k0[i] = static_cast<uint32_t>(key) + i * 0x9E3779B9u;
    k1[i] = static_cast<uint32_t>(key >> 32) + i * 0xBB67AE85u;
  }
  int64_t winner = row.first;
  double best = speed(row, key, position, sample, winner);
  __m512d least = _mm512_set1_pd(best * kMargin * 0x1p-32);
  const __m512i low = _mm512_set1_epi64(0xFFFFFFFF), at = _mm512_set1_epi64(position);
  const __m512i of = _mm512_set1_epi64(sample);
  __m512i tokens = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t v = 0; v < row.vocab; v += 8, tokens = _mm512_add_epi64(tokens, _mm512_set1_epi64(8))) {
    const __mmask8 here = static_cast<__mmask8>(tail_mask(row.vocab - v));
    const __m512i rest = _mm512_andnot_si512(high_words(tokens, at, of, k0, k1), low);  // (1 - u) * 2^32
    const __m512d bound = _mm512_cvtps_pd(_mm256_maskz_loadu_ps(here, row.bounds + v));
    const __m512d needed = _mm512_mul_pd(least, _mm512_cvtepu64_pd(rest));
    uint32_t in = _mm512_mask_cmp_pd_mask(here, bound, needed, _CMP_NLT_UQ);
    for (; in; in &= in - 1) {
      const int64_t token = v + __builtin_ctz(in);
      const double s = speed(row, key, position, sample, token);
      if (s > best || (s == best && token < winner)) {
        best = s, winner = token;
        least = _mm512_set1_pd(best * kMargin * 0x1p-32);
      }
    }
  }
  return winner;
}
#else
void race_bounds(const Race&) { throw std::logic_error("race needs AVX-512"); }
int64_t race(const Race&, uint64_t, uint32_t, uint32_t) { throw std::logic_error("race needs AVX-512"); }
#endif

}  // namespace pmc

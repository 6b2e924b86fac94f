// Counter-based random numbers: functions of their keys, not of the order in which they are drawn.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PMC_HD __host__ __device__
#else
#define PMC_HD
#endif

namespace pmc {

// Philox4x32-10 (Salmon et al. 2011): the first two of its four output words, as one 64-bit number.
PMC_HD inline uint64_t philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0;
    const uint64_t b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (static_cast<uint64_t>(c1) << 32) | c0;
}

// A 64-bit key from a seed and a stream (splitmix64's finaliser over both).
PMC_HD inline uint64_t stream_key(uint64_t seed, uint64_t stream) {
  uint64_t x = seed * 0x9E3779B97F4A7C15u + stream;
  for (int i = 0; i < 2; ++i) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    x ^= x >> 31;
  }
  return x;
}

// Uniform in (0, 1): the top 53 bits, half a step away from both ends.
PMC_HD inline double to_uniform(uint64_t bits) { return (static_cast<double>(bits >> 11) + 0.5) * 0x1p-53; }

}  // namespace pmc

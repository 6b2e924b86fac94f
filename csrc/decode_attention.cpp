#include "decode_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "avx512.h"
#include "parallel.h"

namespace pmc {
namespace {

constexpr int64_t kTileRows = 8;      // rows that read a prompt's keys together
constexpr int64_t kSerial = 1 << 18;  // up to so many multiplications one thread is faster than two
constexpr int kWidth = 16;

template <typename T>
struct Math {
  using Type = T;
};
template <>
struct Math<BFloat16> {
  using Type = float;
};

PMC_INLINE float widen(float x) { return x; }
PMC_INLINE double widen(double x) { return x; }
PMC_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

PMC_INLINE void narrow(float x, float* out) { *out = x; }
PMC_INLINE void narrow(double x, double* out) { *out = x; }
PMC_INLINE void narrow(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) {
    out->bits = static_cast<uint16_t>((bits >> 16) | 0x40);  // a NaN stays one
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);  // to nearest even
  }
}

// One head's keys or values at the slots that a row sees.
template <typename T>
struct Seen {
  const T* pool;  // of the head
  int64_t stride;
  const int32_t* slots;
  int64_t count;
  const T* operator[](int64_t j) const { return pool + slots[j] * stride; }
};

constexpr int kTogether = 4;  // queries that share a load of a key or a value

// Dot products and weighted sums of kTogether queries at once, for any type and processor.
template <typename T, Isa>
struct Kernels {
  using C = typename Math<T>::Type;

  // out[m][j] = q[m] . keys[j]; rows of q and of out are dim and width apart
  PMC_INLINE void dots(const C* q, const Seen<T>& keys, int64_t dim, C* out, int64_t width) {
    for (int64_t j = 0; j < keys.count; ++j) {
      const T* key = keys[j];
      for (int m = 0; m < kTogether; ++m) {
        C lanes[kWidth] = {};
        int64_t d = 0;
        for (; d + kWidth <= dim; d += kWidth) {
          for (int k = 0; k < kWidth; ++k) lanes[k] += q[m * dim + d + k] * widen(key[d + k]);
        }
        for (; d < dim; ++d) lanes[0] += q[m * dim + d] * widen(key[d]);
        for (int half = kWidth / 2; half > 0; half /= 2) {
          for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
        }
        out[m * width + j] = lanes[0];
      }
    }
  }

  // out[m] += sum of weights[m][j] * values[j]
  PMC_INLINE void weigh(const C* weights, int64_t width, const Seen<T>& values, int64_t dim, C* out) {
    for (int64_t j = 0; j < values.count; ++j) {
      const T* value = values[j];
      for (int m = 0; m < kTogether; ++m) {
        const C weight = weights[m * width + j];
        for (int64_t d = 0; d < dim; ++d) out[m * dim + d] += weight * widen(value[d]);
      }
    }
  }
};

#ifdef PMC_X86
PMC_AVX512 inline __m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
PMC_AVX512 inline __m512 load(const BFloat16* p, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

template <typename T>
struct Kernels<T, Isa::kAvx512> {
  PMC_AVX512 static inline void dots(const float* q, const Seen<T>& keys, int64_t dim, float* out,
                                     int64_t width) {
    constexpr int kKeys = 16 / kTogether;
    for (int64_t j = 0; j < keys.count; j += kKeys) {
      const T* key[kKeys];  // past the end the last key is repeated; its sum is not stored
      for (int k = 0; k < kKeys; ++k) key[k] = keys[std::min(j + k, keys.count - 1)];
      __m512 sum[kTogether][kKeys];
      for (int m = 0; m < kTogether; ++m) {
        for (int k = 0; k < kKeys; ++k) sum[m][k] = _mm512_setzero_ps();
      }
      for (int64_t d = 0; d < dim; d += 16) {
        const __mmask16 mask = tail_mask(dim - d);
        __m512 part[kKeys];
        for (int k = 0; k < kKeys; ++k) part[k] = load(key[k] + d, mask);
        for (int m = 0; m < kTogether; ++m) {
          const __m512 query = load(q + m * dim + d, mask);
          for (int k = 0; k < kKeys; ++k) sum[m][k] = _mm512_fmadd_ps(query, part[k], sum[m][k]);
        }
      }
      float all[16];
      _mm512_storeu_ps(all, sum_lanes(&sum[0][0]));
      const int64_t count = std::min<int64_t>(kKeys, keys.count - j);
      for (int m = 0; m < kTogether; ++m) {
        for (int64_t k = 0; k < count; ++k) out[m * width + j + k] = all[m * kKeys + k];
      }
    }
  }

  PMC_AVX512 static inline void weigh(const float* weights, int64_t width, const Seen<T>& values, int64_t dim,
                                      float* out) {
    for (int64_t d = 0; d < dim; d += 64) {
      __mmask16 mask[4];
      for (int k = 0; k < 4; ++k) mask[k] = tail_mask(std::max<int64_t>(0, dim - d - 16 * k));
      __m512 sum[kTogether][4];
      for (int m = 0; m < kTogether; ++m) {
        for (int k = 0; k < 4; ++k) sum[m][k] = load(out + m * dim + d + 16 * k, mask[k]);
      }
      for (int64_t j = 0; j < values.count; ++j) {
        const T* value = values[j] + d;
        __m512 part[4];
        for (int k = 0; k < 4; ++k) part[k] = load(value + 16 * k, mask[k]);
        for (int m = 0; m < kTogether; ++m) {
          const __m512 weight = _mm512_set1_ps(weights[m * width + j]);
          for (int k = 0; k < 4; ++k) sum[m][k] = _mm512_fmadd_ps(weight, part[k], sum[m][k]);
        }
      }
      for (int m = 0; m < kTogether; ++m) {
        for (int k = 0; k < 4; ++k) _mm512_mask_storeu_ps(out + m * dim + d + 16 * k, mask[k], sum[m][k]);
      }
    }
  }
};
template <>
struct Kernels<double, Isa::kAvx512> : Kernels<double, Isa::kGeneric> {};
#endif

// Slots are scattered, so that the hardware cannot prefetch them.
template <typename T>
PMC_INLINE void fetch(const Seen<T>& seen, int64_t dim) {
  for (int64_t j = 0; j < seen.count; ++j) {
    const T* p = seen[j];
    for (int64_t d = 0; d < dim; d += static_cast<int64_t>(64 / sizeof(T))) __builtin_prefetch(p + d, 0, 2);
  }
}

// In place, over a multiple of kWidth numbers.
template <typename C>
PMC_INLINE void softmax(C* row, int64_t size) {
  C lanes[kWidth];
  for (int k = 0; k < kWidth; ++k) lanes[k] = row[k];
  for (int64_t z = kWidth; z < size; z += kWidth) {
    for (int k = 0; k < kWidth; ++k) lanes[k] = row[z + k] > lanes[k] ? row[z + k] : lanes[k];
  }
  C max = lanes[0];
  for (int k = 1; k < kWidth; ++k) max = lanes[k] > max ? lanes[k] : max;
  for (int k = 0; k < kWidth; ++k) lanes[k] = 0;
  for (int64_t z = 0; z < size; z += kWidth) {
    for (int k = 0; k < kWidth; ++k) {
      row[z + k] = exp_of(row[z + k] - max);
      lanes[k] += row[z + k];
    }
  }
  C sum = 0;
  for (int k = 0; k < kWidth; ++k) sum += lanes[k];
  const C inverse = 1 / sum;
  for (int64_t z = 0; z < size; ++z) row[z] *= inverse;
}

struct Tile {
  int64_t block, begin, end;  // rows
};

// The rows of one tile, one key/value head: the prompt's keys and values stay in cache from row to row.
template <typename K, typename T>
PMC_INLINE void attend(const DecodeAttention<T>& a, const Tile& tile, int64_t head,
                       std::vector<typename Math<T>::Type>& scratch) {
  using C = typename Math<T>::Type;
  const int64_t group = a.heads / a.kv_heads, stride = a.kv_heads * a.dim;
  const T *k_pool = a.k_pool + head * a.dim, *v_pool = a.v_pool + head * a.dim;
  const int32_t* prompt = a.index.prefix + a.index.cu_prefix[tile.block];
  for (int64_t r = tile.begin; r < tile.end; ++r) {
    const Span s = span_of(a.index, r, a.window);
    const int32_t *prefix = prompt + s.prefix_begin, *suffix = a.index.suffix + s.suffix_begin;
    const int64_t shared = s.prefix_end - s.prefix_begin, own = s.suffix_end - s.suffix_begin;
    fetch(Seen<T>{v_pool, stride, suffix, own}, a.dim);
    if (r + 1 < tile.end) {
      const Span next = span_of(a.index, r + 1, a.window);
      fetch(Seen<T>{k_pool, stride, a.index.suffix + next.suffix_begin, next.suffix_end - next.suffix_begin},
            a.dim);
    }
    const int64_t keys = shared + own, width = (keys + kWidth - 1) / kWidth * kWidth;
    scratch.resize(static_cast<size_t>(kTogether * (2 * a.dim + width)));
    C *q = scratch.data(), *out = q + kTogether * a.dim, *scores = out + kTogether * a.dim;
    for (int64_t first = 0; first < group; first += kTogether) {
      const int64_t count = std::min<int64_t>(kTogether, group - first), heads = head * group + first;
      for (int64_t m = 0; m < kTogether; ++m) {  // past the end the last query is repeated
        const T* source = a.q + r * a.q_row + (heads + std::min(m, count - 1)) * a.q_head;
        for (int64_t d = 0; d < a.dim; ++d) q[m * a.dim + d] = widen(source[d]) * static_cast<C>(a.scale);
      }
      K::dots(q, Seen<T>{k_pool, stride, prefix, shared}, a.dim, scores, width);
      K::dots(q, Seen<T>{k_pool, stride, suffix, own}, a.dim, scores + shared, width);
      for (int64_t m = 0; m < count; ++m) {
        C* row = scores + m * width;
        if (a.softcap > 0) {
          const C cap = static_cast<C>(a.softcap), inner = 1 / cap;
          for (int64_t z = 0; z < keys; ++z) row[z] = cap * tanh_of(row[z] * inner);
        }
        std::fill(row + keys, row + width, -INFINITY);
        softmax(row, width);
      }
      std::fill(out, out + kTogether * a.dim, C{0});
      K::weigh(scores, width, Seen<T>{v_pool, stride, prefix, shared}, a.dim, out);
      K::weigh(scores + shared, width, Seen<T>{v_pool, stride, suffix, own}, a.dim, out);
      for (int64_t m = 0; m < count; ++m) {
        T* target = a.out + (r * a.heads + heads + m) * a.dim;
        for (int64_t d = 0; d < a.dim; ++d) narrow(out[m * a.dim + d], target + d);
      }
    }
  }
}

template <typename T>
void run(const DecodeAttention<T>& a, Isa isa, int threads) {
  const size_t bytes = static_cast<size_t>(a.dim) * sizeof(T);
  for (int64_t r = 0; r < a.index.rows; ++r) {
    for (int64_t h = 0; h < a.kv_heads; ++h) {
      const int64_t target = (a.index.slots[r] * a.kv_heads + h) * a.dim;
      std::memcpy(a.k_pool + target, a.k + r * a.k_row + h * a.k_head, bytes);
      std::memcpy(a.v_pool + target, a.v + r * a.v_row + h * a.v_head, bytes);
    }
  }
  std::vector<Tile> tiles;
  int64_t work = 0;
  for (int64_t b = 0; b < a.index.blocks; ++b) {
    for (int64_t r = a.index.cu_rows[b]; r < a.index.cu_rows[b + 1]; r += kTileRows) {
      tiles.push_back({b, r, std::min<int64_t>(r + kTileRows, a.index.cu_rows[b + 1])});
    }
  }
  for (int64_t r = 0; r < a.index.rows; ++r) {
    const Span s = span_of(a.index, r, a.window);
    work += (s.prefix_end - s.prefix_begin + s.suffix_end - s.suffix_begin) * a.heads * a.dim * 2;
  }
  parallel_for(static_cast<int64_t>(tiles.size()) * a.kv_heads, work < kSerial ? 1 : threads,
               [&](int64_t begin, int64_t end) {
                 dispatch(isa, [&](auto tag) PMC_ALWAYS_INLINE {
                   std::vector<typename Math<T>::Type> scratch;
                   for (int64_t i = begin; i < end; ++i) {
                     attend<Kernels<T, tag>>(a, tiles[i / a.kv_heads], i % a.kv_heads, scratch);
                   }
                 });
               });
}

}  // namespace

void decode_attention(const DecodeAttention<float>& a, Isa isa, int threads) { run(a, isa, threads); }
void decode_attention(const DecodeAttention<double>& a, Isa isa, int threads) { run(a, isa, threads); }
void decode_attention(const DecodeAttention<BFloat16>& a, Isa isa, int threads) { run(a, isa, threads); }

}  // namespace pmc

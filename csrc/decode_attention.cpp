#include "decode_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "avx512.h"
#include "parallel.h"

namespace pmc {
namespace {

constexpr int64_t kTileRows = 8;     // rows that read a prompt's keys together
constexpr int64_t kAlone = 1 << 18;  // multiplications that are not worth a second thread
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

// What a tile spends its time on, for any type and processor.
template <typename T>
struct Plain {
  using C = typename Math<T>::Type;

  // out[j] = q . keys[j]
  PMC_INLINE void dots(const C* q, const T* const* keys, int64_t count, int64_t dim, C* out) {
    for (int64_t j = 0; j < count; ++j) {
      const T* key = keys[j];
      C lanes[kWidth] = {};
      int64_t d = 0;
      for (; d + kWidth <= dim; d += kWidth) {
        for (int k = 0; k < kWidth; ++k) lanes[k] += q[d + k] * widen(key[d + k]);
      }
      for (; d < dim; ++d) lanes[0] += q[d] * widen(key[d]);
      for (int half = kWidth / 2; half > 0; half /= 2) {
        for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
      }
      out[j] = lanes[0];
    }
  }

  // out += sum of weights[j] * values[j]
  PMC_INLINE void weigh(const C* weights, const T* const* values, int64_t count, int64_t dim, C* out) {
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t d = 0; d < dim; ++d) out[d] += weights[j] * widen(values[j][d]);
    }
  }
};

#ifdef PMC_X86
PMC_AVX512 inline __m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
PMC_AVX512 inline __m512 load(const BFloat16* p, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

template <typename T>
struct Avx512 {
  PMC_AVX512 static inline void dots(const float* q, const T* const* keys, int64_t count, int64_t dim,
                                     float* out) {
    for (int64_t j = 0; j < count; j += 16) {
      const T* key[16];  // past the end the last key again: its sum is not stored
      for (int k = 0; k < 16; ++k) key[k] = keys[std::min(j + k, count - 1)];
      __m512 sum[16];
      for (int k = 0; k < 16; ++k) sum[k] = _mm512_setzero_ps();
      for (int64_t d = 0; d < dim; d += 16) {
        const __mmask16 mask = tail_mask(dim - d);
        const __m512 part = load(q + d, mask);
        for (int k = 0; k < 16; ++k) sum[k] = _mm512_fmadd_ps(part, load(key[k] + d, mask), sum[k]);
      }
      _mm512_mask_storeu_ps(out + j, tail_mask(count - j), sum_lanes(sum));
    }
  }

  PMC_AVX512 static inline void weigh(const float* weights, const T* const* values, int64_t count,
                                      int64_t dim, float* out) {
    for (int64_t d = 0; d < dim; d += 64) {
      __mmask16 mask[4];
      __m512 sum[4];
      for (int k = 0; k < 4; ++k) {
        mask[k] = tail_mask(std::max<int64_t>(0, dim - d - 16 * k));
        sum[k] = load(out + d + 16 * k, mask[k]);
      }
      for (int64_t j = 0; j < count; ++j) {
        const __m512 weight = _mm512_set1_ps(weights[j]);
        for (int k = 0; k < 4; ++k)
          sum[k] = _mm512_fmadd_ps(weight, load(values[j] + d + 16 * k, mask[k]), sum[k]);
      }
      for (int k = 0; k < 4; ++k) _mm512_mask_storeu_ps(out + d + 16 * k, mask[k], sum[k]);
    }
  }
};
template <>
struct Avx512<double> : Plain<double> {};
#endif

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

template <typename T>
struct Scratch {
  std::vector<typename Math<T>::Type> numbers;
  std::vector<const T*> keys, values;
};

// One tile of rows of one block, one key/value head.
template <typename Kernels, typename T>
PMC_INLINE void attend(const DecodeAttention<T>& a, const Tile& tile, int64_t head, Scratch<T>& scratch) {
  using C = typename Math<T>::Type;
  const int64_t group = a.heads / a.kv_heads, rows = tile.end - tile.begin, queries = rows * group;
  const int32_t* prefix = a.index.prefix + a.index.cu_prefix[tile.block];
  Span spans[kTileRows];
  int64_t low = INT64_MAX, high = 0, longest = 0;
  for (int64_t r = 0; r < rows; ++r) {
    spans[r] = span_of(a.index, tile.begin + r, a.window);
    low = std::min<int64_t>(low, spans[r].prefix_begin);
    high = std::max<int64_t>(high, spans[r].prefix_end);
    longest = std::max<int64_t>(longest, spans[r].suffix_end - spans[r].suffix_begin);
  }
  const int64_t shared = std::max<int64_t>(0, high - low),
                width = (shared + longest + kWidth - 1) / kWidth * kWidth;
  scratch.numbers.resize(static_cast<size_t>(queries * (2 * a.dim + width)));
  C* q = scratch.numbers.data();
  C* out = q + queries * a.dim;
  C* scores = out + queries * a.dim;
  for (int64_t m = 0; m < queries; ++m) {
    const T* source = a.q + (tile.begin + m / group) * a.q_row + (head * group + m % group) * a.q_head;
    for (int64_t d = 0; d < a.dim; ++d) q[m * a.dim + d] = widen(source[d]) * static_cast<C>(a.scale);
  }
  // pointers to the shared keys and values, then to each row's own
  scratch.keys.clear();
  scratch.values.clear();
  const auto see = [&](int32_t slot) {
    const int64_t at = (slot * a.kv_heads + head) * a.dim;
    scratch.keys.push_back(a.k_pool + at);
    scratch.values.push_back(a.v_pool + at);
  };
  for (int64_t p = 0; p < shared; ++p) see(prefix[low + p]);
  int64_t own[kTileRows];
  for (int64_t r = 0; r < rows; ++r) {
    own[r] = static_cast<int64_t>(scratch.keys.size());
    for (int32_t j = spans[r].suffix_begin; j < spans[r].suffix_end; ++j) see(a.index.suffix[j]);
  }
  for (int64_t m = 0; m < queries; ++m) {
    const Span& s = spans[m / group];
    C* row = scores + m * width;
    if (shared) Kernels::dots(q + m * a.dim, scratch.keys.data(), shared, a.dim, row);
    const int64_t count = s.suffix_end - s.suffix_begin;
    if (count) Kernels::dots(q + m * a.dim, scratch.keys.data() + own[m / group], count, a.dim, row + shared);
  }
  for (int64_t m = 0; m < queries; ++m) {
    const Span& s = spans[m / group];
    C* row = scores + m * width;
    // in the shared part, what is outside a row's own span is another row's; behind its suffix is nothing
    const int64_t begin = std::min<int64_t>(s.prefix_begin - low, shared),
                  end = std::max<int64_t>(begin, s.prefix_end - low);
    const int64_t last = shared + (s.suffix_end - s.suffix_begin);
    if (a.softcap > 0) {
      const C cap = static_cast<C>(a.softcap), inner = 1 / cap;
      for (int64_t z = 0; z < last; ++z) row[z] = cap * tanh_of(row[z] * inner);
    }
    const auto hide = [&](C with) {
      std::fill(row, row + begin, with);
      if (end < shared) std::fill(row + end, row + shared, with);
      std::fill(row + last, row + width, with);
    };
    hide(-INFINITY);
    softmax(row, width);
    hide(0);  // exp_of ends at the smallest normal number
  }
  std::fill(out, out + queries * a.dim, C{0});
  for (int64_t m = 0; m < queries; ++m) {
    const Span& s = spans[m / group];
    const C* row = scores + m * width;
    Kernels::weigh(row, scratch.values.data(), shared, a.dim, out + m * a.dim);
    Kernels::weigh(row + shared, scratch.values.data() + own[m / group], s.suffix_end - s.suffix_begin, a.dim,
                   out + m * a.dim);
  }
  for (int64_t m = 0; m < queries; ++m) {
    T* target = a.out + ((tile.begin + m / group) * a.heads + head * group + m % group) * a.dim;
    for (int64_t d = 0; d < a.dim; ++d) narrow(out[m * a.dim + d], target + d);
  }
}

template <typename Kernels, typename T>
PMC_INLINE void attend_some(const DecodeAttention<T>& a, const std::vector<Tile>& tiles, int64_t begin,
                            int64_t end) {
  Scratch<T> scratch;
  for (int64_t i = begin; i < end; ++i) attend<Kernels>(a, tiles[i / a.kv_heads], i % a.kv_heads, scratch);
}

template <typename T>
void some_generic(const DecodeAttention<T>& a, const std::vector<Tile>& tiles, int64_t begin, int64_t end) {
  attend_some<Plain<T>>(a, tiles, begin, end);
}
#ifdef PMC_X86
template <typename T>
PMC_AVX2 void some_avx2(const DecodeAttention<T>& a, const std::vector<Tile>& tiles, int64_t begin,
                        int64_t end) {
  attend_some<Plain<T>>(a, tiles, begin, end);
}
template <typename T>
PMC_AVX512 void some_avx512(const DecodeAttention<T>& a, const std::vector<Tile>& tiles, int64_t begin,
                            int64_t end) {
  attend_some<Avx512<T>>(a, tiles, begin, end);
}
#endif

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
  auto* some = &some_generic<T>;
#ifdef PMC_X86
  if (isa == Isa::kAvx2) some = &some_avx2<T>;
  if (isa == Isa::kAvx512) some = &some_avx512<T>;
#endif
  parallel_for(static_cast<int64_t>(tiles.size()) * a.kv_heads, work < kAlone ? 1 : threads,
               [&](int64_t begin, int64_t end) { some(a, tiles, begin, end); });
}

}  // namespace

void decode_attention(const DecodeAttention<float>& a, Isa isa, int threads) { run(a, isa, threads); }
void decode_attention(const DecodeAttention<double>& a, Isa isa, int threads) { run(a, isa, threads); }
void decode_attention(const DecodeAttention<BFloat16>& a, Isa isa, int threads) { run(a, isa, threads); }

}  // namespace pmc

#include "gemm.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "avx512.h"
#include "parallel.h"

namespace pmc {

#ifdef PMC_X86
namespace {

// A tile of c is kTile rows x kPanel columns: 14 x 2 sums, two vectors of b and one number of a fill the
// registers. What a thread works on at once of a, b and c takes about 0.8 of 1 MB of second-level cache, and
// a tile's rows of a stay in the first level while all panels of b pass by. (9 panels: half of 576 columns.)
constexpr int64_t kTile = 14;
constexpr int64_t kLane = 16;  // numbers of a vector, and of a row of a packed tile of a
constexpr int64_t kPanel = 2 * kLane;
constexpr int64_t kDepth = 512;  // of k at once: also bounds the rounding of long sums
constexpr int64_t kRows = 6 * kTile;
constexpr int64_t kColumns = 9 * kPanel;
constexpr int64_t kAhead = 8;  // rows: packed later, fetched now, as they lie too far apart for the hardware

// Numbers on a cache line's start that outlive a call: fresh memory costs more than packing into it.
float* scratch(int64_t size, int which) {
  thread_local std::vector<float> memory[2];
  std::vector<float>& v = memory[which];
  if (static_cast<int64_t>(v.size()) < size + 16) v.resize(static_cast<size_t>(size + 16));
  float* p = v.data();
  return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64 / sizeof(float);
}

// c[MR, NR * 16] = start + a @ b, where a's number (i, k) is a[i * row + k * step].
struct Tile {
  const float* a;
  const float* b;  // [depth, NR * 16]
  float* c;
  const float* start;  // null: 0
  int64_t row, depth, ldc, start_ld;
  __mmask16 low, high;
  const float* ahead;  // rows of a that a later tile reads, to be fetched meanwhile
  int64_t ahead_rows;
};

template <int MR, int NR, bool kPacked>
PMC_AVX512 void tile(const Tile& t) {
  __m512 sum[MR][NR];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NR; ++j) {
      sum[i][j] = _mm512_setzero_ps();
    }
    _mm_prefetch(reinterpret_cast<const char*>(t.c + i * t.ldc), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(t.c + i * t.ldc + NR * 16 - 1), _MM_HINT_T0);
  }
  const float *a = t.a, *b = t.b;
  const int64_t row = t.row;
  for (int64_t k = 0; k < t.depth;) {
    const int64_t stop = std::min(t.depth, k + 16);
    for (int64_t r = 0; r < t.ahead_rows; ++r) {
      _mm_prefetch(reinterpret_cast<const char*>(t.ahead + r * row + k), _MM_HINT_T0);
    }
    for (; k < stop; ++k) {
      __m512 v[NR];
      for (int j = 0; j < NR; ++j) v[j] = _mm512_load_ps(b + k * NR * 16 + j * 16);
      for (int i = 0; i < MR; ++i) {
        const __m512 x = _mm512_set1_ps(kPacked ? a[k * kLane + i] : a[i * row + k]);
        for (int j = 0; j < NR; ++j) sum[i][j] = _mm512_fmadd_ps(x, v[j], sum[i][j]);
      }
    }
  }
  const __mmask16 masks[2] = {t.low, t.high};
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NR; ++j) {
      __m512 s = sum[i][j];
      if (t.start) s = _mm512_add_ps(s, _mm512_maskz_loadu_ps(masks[j], t.start + i * t.start_ld + j * 16));
      _mm512_mask_storeu_ps(t.c + i * t.ldc + j * 16, masks[j], s);
    }
  }
}

using TileFn = void (*)(const Tile&);
template <int NR, bool kPacked>
TileFn tile_of(int64_t rows) {
  static constexpr TileFn kAll[] = {tile<1, NR, kPacked>,  tile<2, NR, kPacked>,  tile<3, NR, kPacked>,
                                    tile<4, NR, kPacked>,  tile<5, NR, kPacked>,  tile<6, NR, kPacked>,
                                    tile<7, NR, kPacked>,  tile<8, NR, kPacked>,  tile<9, NR, kPacked>,
                                    tile<10, NR, kPacked>, tile<11, NR, kPacked>, tile<12, NR, kPacked>,
                                    tile<13, NR, kPacked>, tile<14, NR, kPacked>};
  return kAll[rows - 1];
}

PMC_AVX512 inline void fetch(const float* row, int64_t size) {
  for (int64_t i = 0; i < size; i += 16) _mm_prefetch(reinterpret_cast<const char*>(row + i), _MM_HINT_T0);
}

// Panels of b, each [depth, 32]; the last is [depth, 16] if it has no more columns. A panel's columns past
// b's are repeated or 0: their sums are never stored.
PMC_AVX512 void pack_b(const Gemm& g, int64_t n0, int64_t columns, int64_t k0, int64_t depth, float* to) {
  const int64_t wide = columns / kPanel * kPanel + (columns % kPanel > 16 ? kPanel : 0);  // the rest is 16
  if (g.b_turned) {
    for (int64_t n = 0; n < columns; n += 16) {
      float* at = to + n / kPanel * kPanel * depth + n % kPanel;
      turn16(g.b + (n0 + n) * g.ldb + k0, g.ldb, columns - n, depth, at, n < wide ? kPanel : 16);
    }
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    const float* from = g.b + (k0 + k) * g.ldb + n0;
    fetch(from + kAhead * g.ldb, k + kAhead < depth ? columns : 0);
    for (int64_t n = 0; n < columns; n += 16) {
      float* at = to + n / kPanel * kPanel * depth + n % kPanel + k * (n < wide ? kPanel : 16);
      _mm512_store_ps(at, _mm512_maskz_loadu_ps(tail_mask(columns - n), from + n));
    }
  }
}

// Tiles of a, each [depth, 16].
PMC_AVX512 void pack_a(const Gemm& g, int64_t m0, int64_t rows, int64_t tiles, int64_t k0, int64_t depth,
                       float* to) {
  if (!g.a_turned) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = rows * t / tiles;
      turn16(g.a + (m0 + m) * g.lda + k0, g.lda, rows * (t + 1) / tiles - m, depth, to + t * depth * kLane,
             kLane);
    }
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    const float* from = g.a + (k0 + k) * g.lda + m0;
    fetch(from + kAhead * g.lda, k + kAhead < depth ? rows : 0);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = rows * t / tiles;
      const __mmask16 mask = tail_mask(rows * (t + 1) / tiles - m);
      _mm512_store_ps(to + (t * depth + k) * kLane, _mm512_maskz_loadu_ps(mask, from + m));
    }
  }
}

// A rectangle of c, by one thread.
void part(const Gemm& g, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end) {
  const int64_t rows = m_end - m_begin, blocks = (rows + kRows - 1) / kRows;
  const int64_t cuts = std::max<int64_t>(1, (g.k + kDepth - 1) / kDepth);
  float* b = scratch(kDepth * kColumns, 0);
  // rows that lie some pages apart share a set of the first-level cache, and a tile has too many of them
  const bool pack = g.a_turned || g.lda % 1024 == 0;
  float* a = pack ? scratch(kDepth * (kRows / kTile + 2) * kLane, 1) : nullptr;
  const int64_t panels = (n_end - n_begin + kPanel - 1) / kPanel;
  const int64_t stripes = (panels * kPanel + kColumns - 1) / kColumns;
  for (int64_t stripe = 0; stripe < stripes; ++stripe) {
    const int64_t n0 = n_begin + panels * stripe / stripes * kPanel;
    const int64_t columns = std::min(n_end, n_begin + panels * (stripe + 1) / stripes * kPanel) - n0;
    for (int64_t cut = 0; cut < cuts; ++cut) {
      const int64_t k0 = g.k * cut / cuts, depth = g.k * (cut + 1) / cuts - k0;
      pack_b(g, n0, columns, k0, depth, b);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t m0 = m_begin + rows * block / blocks;
        const int64_t height = m_begin + rows * (block + 1) / blocks - m0;
        const int64_t tiles = (height + kTile - 1) / kTile;
        if (a) pack_a(g, m0, height, tiles, k0, depth, a);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t m = height * t / tiles, size = height * (t + 1) / tiles - m;
          const int64_t next = std::min(kTile, m_end - m0 - m - size);  // rows of the next tile, about
          for (int64_t n = 0; n < columns; n += kPanel) {
            const int64_t left = columns - n;
            Tile tile;
            tile.a = a ? a + t * kLane * depth : g.a + (m0 + m) * g.lda + k0;
            tile.b = b + n * depth;
            tile.c = g.c + (m0 + m) * g.ldc + n0 + n;
            const bool again = cut > 0 || g.add;
            tile.start = again ? tile.c : g.bias ? g.bias + n0 + n : nullptr;
            tile.row = g.lda, tile.depth = depth, tile.ldc = g.ldc, tile.start_ld = again ? g.ldc : 0;
            tile.low = tail_mask(left), tile.high = left > 16 ? tail_mask(left - 16) : 0;
            const int64_t first = next * n / columns;
            tile.ahead = tile.a + (size + first) * g.lda;
            tile.ahead_rows = a ? 0 : next * std::min(columns, n + kPanel) / columns - first;
            const TileFn run = a ? (left > 16 ? tile_of<2, true>(size) : tile_of<1, true>(size))
                                 : (left > 16 ? tile_of<2, false>(size) : tile_of<1, false>(size));
            run(tile);
          }
        }
      }
    }
  }
}

}  // namespace

void gemm(const Gemm& g, int threads) {
  // each thread packs what it needs by itself: cut where the least is packed twice
  const int64_t panels = (g.n + kPanel - 1) / kPanel, tiles = (g.m + kTile - 1) / kTile;
  int64_t down = 1, across = threads;
  double best = 0;
  for (int64_t d = 1; d <= threads; ++d) {
    if (threads % d) continue;
    const int64_t w = threads / d;
    const double height = static_cast<double>((tiles + d - 1) / d * kTile);
    const double width = static_cast<double>((panels + w - 1) / w * kPanel);
    const double cost = height * width + 16 * width + (g.a_turned ? 16 : 2) * height;
    if (d == 1 || cost < best) best = cost, down = d, across = w;
  }
  parallel_for(down * across, threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t i = p / across, j = p % across;
      part(g, tiles * i / down * kTile, std::min(g.m, tiles * (i + 1) / down * kTile),
           panels * j / across * kPanel, std::min(g.n, panels * (j + 1) / across * kPanel));
    }
  });
}
#else
void gemm(const Gemm&, int) { throw std::logic_error("gemm needs AVX-512"); }
#endif

}  // namespace pmc

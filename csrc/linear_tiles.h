// The tiles of linear.cpp, for one instruction set. Included once for each, in a namespace of its own that
// defines
//   PMC_TARGET  the functions' attribute
//   Vec         a vector of kWidth floats, with zero, load, load_part (of fewer), multiply_add(a, b, sum) and
//               store_sums(v, n, out), which writes the sum of the lanes of each of n vectors
//   kTile       the rows of x that a tile has at most
// For that reason there is no #pragma once.

constexpr int64_t kStripe = 12;  // rows of weight that stay in the first-level cache while all tiles use them
constexpr int64_t kAhead = 32;   // rows of weight fetched ahead where each is used once

// y[MR, NR] of rows of x and rows of weight, each a dot product.
template <int MR, int NR>
PMC_TARGET inline void dot_tile(const Linear& a, int64_t m, int64_t n, int64_t ahead) {
  Vec sum[MR * NR];
  for (int i = 0; i < MR * NR; ++i) sum[i] = zero();
  const float* x = a.x + m * a.in;
  const float* w = a.weight + n * a.in;
  int64_t k = 0;
  for (; k + kWidth <= a.in; k += kWidth) {
    Vec row[NR];
    for (int j = 0; j < NR; ++j) {
      row[j] = load(w + j * a.in + k);
      _mm_prefetch(reinterpret_cast<const char*>(w + j * a.in + k + ahead), _MM_HINT_T1);
    }
    for (int i = 0; i < MR; ++i) {
      const Vec v = load(x + i * a.in + k);
      for (int j = 0; j < NR; ++j) sum[i * NR + j] = multiply_add(v, row[j], sum[i * NR + j]);
    }
  }
  if (k < a.in) {
    for (int i = 0; i < MR; ++i) {
      const Vec v = load_part(x + i * a.in + k, a.in - k);
      for (int j = 0; j < NR; ++j) {
        sum[i * NR + j] = multiply_add(v, load_part(w + j * a.in + k, a.in - k), sum[i * NR + j]);
      }
    }
  }
  float total[MR * NR];
  store_sums(sum, MR * NR, total);
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NR; ++j) {
      a.y[(m + i) * a.out + n + j] = total[i * NR + j] + (a.bias ? a.bias[n + j] : 0.0f);
    }
  }
}

template <int MR, int NR>
PMC_TARGET void dot_columns(const Linear& a, int64_t m, int64_t begin, int64_t end, int64_t ahead) {
  int64_t n = begin;
  for (; n + NR <= end; n += NR) dot_tile<MR, NR>(a, m, n, ahead);
  for (; n < end; ++n) dot_tile<MR, 1>(a, m, n, ahead);
}

using Columns = void (*)(const Linear&, int64_t, int64_t, int64_t, int64_t);

// Of tiles of up to kTile rows, columns[size - 1] is the function of one.
inline void stripes(const Linear& a, int64_t begin, int64_t end, const Columns* columns) {
  const int64_t tiles = (a.rows + kTile - 1) / kTile;
  const int64_t stripe = tiles == 1 ? end - begin : kStripe;
  const int64_t ahead = (tiles == 1 ? kAhead : kStripe) * a.in;
  for (int64_t n = begin; n < end; n += stripe) {
    const int64_t stop = std::min(end, n + stripe);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = a.rows * t / tiles, size = a.rows * (t + 1) / tiles - m;
      columns[size - 1](a, m, n, stop, ahead);
    }
  }
}

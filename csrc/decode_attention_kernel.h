// The CUDA kernels of decode_attention.h, apart from their launch: what they need of CUDA is few enough
// built-ins that a test compiles this file for the CPU and runs it there, thread by thread.
//
// A thread block serves one question (a block of StepIndex), one key/value head and a tile of `units`: a unit
// is what one warp holds in registers, up to kQueries queries of one or more rows. The prompt's keys and
// values come into shared memory once for the whole tile, 32 keys a warp at a time, so that the 256 keys of
// 8 warps hold most prompts whole and all their bytes are in flight together; then each warp turns its part
// of that memory into a place of its own for its rows' suffixes, and no longer waits for the others. Where
// a tile has fewer units than warps (a few rows; the end of a question), warps split the keys of a unit.
//
// Bytes, for 20 rows of 3 grouped heads, dim 128, bfloat16, prompt 100 and suffix 50: a row on its own reads
// 150 x 512 bytes a head; 3 tiles of 8 rows read 3 x 100 x 512 for the prompts and 20 x 50 x 512 for the
// suffixes: 2.3 times less. What is left are mostly the suffixes, which no two rows share.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "decode_attention.h"

namespace pmc {

constexpr int kWarp = 32;           // also the keys that a warp scores at once, a lane each
constexpr int kQueries = 4;         // of a warp: each number of a key or value that is read serves so many
constexpr int kMaxWarps = 8;        // of a thread block
constexpr int64_t kMaxDim = 256;    // in registers: dim / 32 sums a lane for each of kQueries
constexpr int64_t kDimStep = 8;     // 16 bytes of bfloat16
constexpr int64_t kPackBytes = 16;  // the widest load

// How the rows x grouped heads of a question lie in units, and units in tiles. Groups up to kQueries keep a
// row in one unit, larger ones cut it in equal parts, so that a suffix is read as few times as possible.
struct Tiling {
  int32_t group;  // heads that share a key/value head
  int32_t rows_per_unit, units_per_row, heads_per_unit;
  int32_t units;  // of a tile: its warps
};

// Queries of one warp: rows (of the question) x grouped heads.
struct Unit {
  int64_t row;
  int32_t rows, head, heads;
};

PMC_SHARED int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PMC_SHARED int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
PMC_SHARED int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

PMC_SHARED Tiling tiling_of(int64_t group, int64_t units) {
  const int64_t cuts = ceil_div(group, kQueries);
  return {static_cast<int32_t>(group), static_cast<int32_t>(at_least(1, kQueries / group)),
          static_cast<int32_t>(cuts), static_cast<int32_t>(ceil_div(group, cuts)),
          static_cast<int32_t>(units)};
}

// First tile of a question whose rows begin at `first_row`. The tiles before it are rounded down and one is
// added for each question, which leaves every question enough (the last ones may be empty): the host can
// launch tile_begin(all rows, all questions) tiles without knowing how rows lie in questions.
PMC_SHARED int64_t tile_begin(const Tiling& t, int64_t first_row, int64_t question) {
  return first_row * t.units_per_row / (t.rows_per_unit * t.units) + question;
}

PMC_SHARED int64_t unit_count(const Tiling& t, int64_t rows) {
  return ceil_div(rows, t.rows_per_unit) * t.units_per_row;
}

PMC_SHARED Unit unit_of(const Tiling& t, int64_t rows, int64_t unit) {
  const int64_t row = unit / t.units_per_row * t.rows_per_unit,
                head = unit % t.units_per_row * t.heads_per_unit;
  return {row, static_cast<int32_t>(at_most(t.rows_per_unit, rows - row)), static_cast<int32_t>(head),
          static_cast<int32_t>(at_most(t.heads_per_unit, t.group - head))};
}

// Where the part of `count` that one of `parts` warps does begins; part + 1: where it ends.
PMC_SHARED int part_begin(int count, int part, int parts) { return count * part / parts; }

// Packs of one head's numbers.
PMC_SHARED int packs_of(int64_t dim, int64_t size) { return static_cast<int>(dim * size / kPackBytes); }

// Packs from one key to the next in shared memory: an odd number, or lanes that read the same place of
// neighbouring keys would meet in the same banks. (Of a value they read neighbouring places.)
PMC_SHARED int key_packs(int64_t dim, int64_t size) { return packs_of(dim, size) | 1; }

// A query of a tile: what its row sees, the row (of all) and the head (of the group); row -1: none.
struct Query {
  Span span;
  int32_t row, head;
};

PMC_SHARED Query query_of(const Tiling& t, const StepIndex& index, int64_t window, int64_t first_row,
                          int64_t rows, int64_t unit, int i) {
  const Unit u = unit_of(t, rows, unit);
  if (i >= u.rows * u.heads) return {{0, 0, 0, 0}, -1, 0};
  const int64_t row = first_row + u.row + i / u.heads;
  return {span_of(index, row, window), static_cast<int32_t>(row), u.head + i % u.heads};
}

// Shared memory of a thread block, in bytes from its start.
struct Layout {
  int64_t values, numbers, weights, queries, peaks, sums, bytes;  // keys are at 0; numbers: of the queries
};

// size, sum_size: bytes of a stored number, and of one that is computed with
PMC_SHARED Layout layout_of(int64_t warps, int64_t dim, int64_t size, int64_t sum_size) {
  Layout l{};
  l.values = warps * kWarp * key_packs(dim, size) * kPackBytes;
  l.numbers = l.values + warps * kWarp * dim * size;
  l.weights = l.numbers + warps * kQueries * dim * sum_size;
  l.queries = l.weights + warps * kWarp * kQueries * sum_size;
  l.peaks = l.queries + warps * kQueries * static_cast<int64_t>(sizeof(Query));
  l.sums = l.peaks + warps * kQueries * sum_size;
  l.bytes = l.sums + warps * kQueries * sum_size;
  return l;
}

// Most warps (a power of two) that `limit` bytes of shared memory serve; 0 if not even one.
PMC_SHARED int64_t warps_within(int64_t limit, int64_t dim, int64_t size, int64_t sum_size) {
  int64_t warps = kMaxWarps;
  while (warps > 0 && layout_of(warps, dim, size, sum_size).bytes > limit) warps /= 2;
  return warps;
}

#ifdef PMC_DEVICE  // in nvcc, or in the test's emulation

template <typename T>
struct alignas(16) Pack {
  T x[kPackBytes / sizeof(T)];
};
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T x[2];
};

template <typename T>
struct SumOf {
  using Type = T;
};
template <>
struct SumOf<BFloat16> {
  using Type = float;
};

PMC_DEVICE float as_sum(float x) { return x; }
PMC_DEVICE double as_sum(double x) { return x; }
PMC_DEVICE float as_sum(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

PMC_DEVICE void store(float x, float* out) { *out = x; }
PMC_DEVICE void store(double x, double* out) { *out = x; }
PMC_DEVICE void store(float x, BFloat16* out) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  out->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40  // a NaN stays one
                                           : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// What a warp knows of its queries so far: online softmax, each lane with its own keys' share of `sum`.
template <typename C, int kPairs>
struct Running {
  C peak[kQueries], sum[kQueries], out[kQueries][2 * kPairs];
};

// exp(low - high), also where both are -infinity because nothing was seen yet
template <typename C>
PMC_DEVICE C shrink(C low, C high) {
  return low == high ? C{1} : std::exp(low - high);
}

// Brings the keys and values of `count` slots into shared memory, `threads` threads together. It only starts
// the copies: wait_copies, then a barrier of those threads.
template <typename T>
PMC_DEVICE void stage(const DecodeAttention<T>& a, const int32_t* slots, int count, int64_t kv_head,
                      Pack<T>* keys, Pack<T>* values, int thread, int threads) {
  const int packs = packs_of(a.dim, sizeof(T)), stride = key_packs(a.dim, sizeof(T));
  const int more_keys = threads / packs, more_packs = threads % packs;  // no division in the loop
  for (int key = thread / packs, pack = thread % packs; key < count;) {
    const int64_t from = (slots[key] * a.kv_heads + kv_head) * a.dim;
    copy_pack(keys + key * stride + pack, reinterpret_cast<const Pack<T>*>(a.k_pool + from) + pack);
    copy_pack(values + key * packs + pack, reinterpret_cast<const Pack<T>*>(a.v_pool + from) + pack);
    key += more_keys;
    pack += more_packs;
    if (pack >= packs) {
      pack -= packs;
      ++key;
    }
  }
}

// One warp, up to kWarp staged keys: query i sees keys low[i] .. high[i].
template <typename T, typename C, int kPairs>
PMC_DEVICE void attend_keys(const DecodeAttention<T>& a, const Pack<T>* keys, const Pack<T>* values,
                            int count, const C* queries, Pack<C>* weights, const int (&low)[kQueries],
                            const int (&high)[kQueries], int lane, Running<C, kPairs>& run) {
  constexpr int kPer = kPackBytes / sizeof(T), kPerSum = kPackBytes / sizeof(C);
  constexpr int kWeightPacks = kQueries / kPerSum;
  const int dim = static_cast<int>(a.dim), packs = dim / kPer;
  C z[kQueries] = {};
  // A lane a key: no sum crosses lanes. Lanes without a key repeat the last one.
  const Pack<T>* key = keys + (lane < count ? lane : count - 1) * key_packs(dim, sizeof(T));
  for (int p = 0; p < packs; ++p) {
    const Pack<T> part = key[p];
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      if (low[i] >= high[i]) continue;  // the same in all lanes, as everywhere below
      const Pack<C>* q = reinterpret_cast<const Pack<C>*>(queries + i * dim + p * kPer);
      C sum = 0;  // of its own: rounding grows with the longest row of additions
#pragma unroll
      for (int e = 0; e < kPer; e += kPerSum) {
        const Pack<C> some = q[e / kPerSum];
#pragma unroll
        for (int f = 0; f < kPerSum; ++f) sum += some.x[f] * as_sum(part.x[e + f]);
      }
      z[i] += sum;
    }
  }
  int first = kWarp, last = 0;
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    if (low[i] >= high[i]) continue;
    first = low[i] < first ? low[i] : first;
    last = high[i] > last ? high[i] : last;
    const bool sees = lane >= low[i] && lane < high[i];
    C score = z[i];
    if (a.softcap > 0) {
      const C cap = static_cast<C>(a.softcap);
      score = cap * std::tanh(score / cap);
    }
    if (!sees) score = -INFINITY;
    C peak = score;
#pragma unroll
    for (int other = kWarp / 2; other > 0; other /= 2) {
      const C theirs = __shfl_xor_sync(0xFFFFFFFFu, peak, other);
      peak = theirs > peak ? theirs : peak;
    }
    peak = run.peak[i] > peak ? run.peak[i] : peak;
    const C keep = shrink(run.peak[i], peak);
    const C weight = score == -INFINITY ? C{0} : std::exp(score - peak);
    run.peak[i] = peak;
    run.sum[i] = run.sum[i] * keep + weight;
#pragma unroll
    for (int d = 0; d < 2 * kPairs; ++d) run.out[i][d] *= keep;
    weights[lane * kWeightPacks + i / kPerSum].x[i % kPerSum] = weight;
  }
  __syncwarp();
  // Now a lane has numbers 2 lane and 2 lane + 1 of each 64 of a value; those past dim repeat the first.
  const T* numbers = reinterpret_cast<const T*>(values);
  for (int j = first; j < last; ++j) {
    C weight[kQueries];
#pragma unroll
    for (int w = 0; w < kWeightPacks; ++w) {
      const Pack<C> some = weights[j * kWeightPacks + w];
#pragma unroll
      for (int f = 0; f < kPerSum; ++f) weight[w * kPerSum + f] = some.x[f];
    }
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const int d = 2 * (lane + kWarp * p);
      const auto two = *reinterpret_cast<const Pair<T>*>(numbers + j * dim + (d < dim ? d : 0));
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        if (low[i] >= high[i]) continue;
        run.out[i][2 * p] += weight[i] * as_sum(two.x[0]);
        run.out[i][2 * p + 1] += weight[i] * as_sum(two.x[1]);
      }
    }
  }
  __syncwarp();  // before the next keys' weights
}

// Thread block (tile, kv_head) of tile_begin(t, rows, blocks) x kv_heads, of t.units warps each.
// One thread block a multiprocessor is enough for the compiler: shared memory admits one or two, and with
// registers for more it would spill.
template <typename T, int kPairs>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    decode_attention_kernel(const DecodeAttention<T> a, const Tiling t) {
  using C = typename SumOf<T>::Type;
  extern __shared__ uint4 decode_shared[];
  char* const shared = reinterpret_cast<char*>(decode_shared);
  const int thread = static_cast<int>(threadIdx.x), threads = t.units * kWarp;
  const int lane = thread % kWarp, warp = thread / kWarp;
  const int64_t tile = blockIdx.x, kv_head = blockIdx.y;

  // The question is the last whose tiles begin at or before this one. Every thread looks at another one: a
  // search would wait for memory once a halving.
  int64_t question = -1;
  for (int64_t first = 0; first < a.index.blocks; first += threads) {
    const int64_t b = first + thread;
    question += __syncthreads_count(b < a.index.blocks && tile_begin(t, a.index.cu_rows[b], b) <= tile);
  }
  const int64_t row0 = a.index.cu_rows[question], rows = a.index.cu_rows[question + 1] - row0;
  const int64_t unit0 = (tile - tile_begin(t, row0, question)) * t.units;
  if (unit0 >= unit_count(t, rows)) return;  // the whole block: an empty tile
  const int units = static_cast<int>(at_most(t.units, unit_count(t, rows) - unit0)), splits = t.units / units;
  const int split = warp / units, mine = warp % units;  // with split >= splits a warp only helps to copy
  const Unit unit = unit_of(t, rows, unit0 + mine);

  const Layout l = layout_of(t.units, a.dim, sizeof(T), sizeof(C));
  Pack<T>* const keys = reinterpret_cast<Pack<T>*>(shared);
  Pack<T>* const values = reinterpret_cast<Pack<T>*>(shared + l.values);
  C* const numbers = reinterpret_cast<C*>(shared + l.numbers);
  Pack<C>* const weights = reinterpret_cast<Pack<C>*>(shared + l.weights) +
                           warp * kWarp * static_cast<int>(kQueries * sizeof(C) / kPackBytes);
  Query* const queries = reinterpret_cast<Query*>(shared + l.queries);
  C* const peaks = reinterpret_cast<C*>(shared + l.peaks);
  C* const sums = reinterpret_cast<C*>(shared + l.sums);
  const int dim = static_cast<int>(a.dim), count_queries = units * kQueries;
  const int key_stride = key_packs(dim, sizeof(T)), value_stride = packs_of(dim, sizeof(T));

  for (int m = thread; m < count_queries; m += threads) {
    queries[m] = query_of(t, a.index, a.window, row0, rows, unit0 + m / kQueries, m % kQueries);
  }
  __syncthreads();
  int prompt_low = INT32_MAX, prompt_high = 0;
  for (int m = 0; m < count_queries; ++m) {
    const Span s = queries[m].span;
    if (s.prefix_begin >= s.prefix_end) continue;
    prompt_low = s.prefix_begin < prompt_low ? s.prefix_begin : prompt_low;
    prompt_high = s.prefix_end > prompt_high ? s.prefix_end : prompt_high;
  }
  for (int m = warp; m < count_queries; m += t.units) {
    const int64_t row = queries[m].row, head = kv_head * t.group + queries[m].head;
    for (int d = lane; row >= 0 && d < dim; d += kWarp) {
      numbers[m * dim + d] = as_sum(a.q[row * a.q_row + head * a.q_head + d]) * static_cast<C>(a.scale);
    }
  }
  const C* const my_numbers = numbers + mine * kQueries * dim;
  const Query* const my_queries = queries + mine * kQueries;
  int low[kQueries], high[kQueries];
  Running<C, kPairs> run;
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    run.peak[i] = -INFINITY;
    run.sum[i] = 0;
#pragma unroll
    for (int d = 0; d < 2 * kPairs; ++d) run.out[i][d] = 0;
  }

  for (int at = prompt_low; at < prompt_high; at += threads) {  // as many keys as threads: kWarp a warp
    const int count = static_cast<int>(at_most(threads, prompt_high - at));
    if (at > prompt_low) __syncthreads();  // all are done with the keys before
    stage(a, a.index.prefix + a.index.cu_prefix[question] + at, count, kv_head, keys, values, thread,
          threads);
    wait_copies();
    __syncthreads();
    if (split >= splits) continue;
    const int end = part_begin(count, split + 1, splits);
    for (int key = part_begin(count, split, splits); key < end; key += kWarp) {
      const int some = static_cast<int>(at_most(kWarp, end - key));
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        low[i] = static_cast<int>(at_least(0, my_queries[i].span.prefix_begin - at - key));
        high[i] = static_cast<int>(at_most(some, my_queries[i].span.prefix_end - at - key));
      }
      attend_keys(a, keys + key * key_stride, values + key * value_stride, some, my_numbers, weights, low,
                  high, lane, run);
    }
  }
  __syncthreads();  // from here each warp keeps to its own part of the staged keys and values
  Pack<T>* const own_keys = keys + warp * kWarp * key_stride;
  Pack<T>* const own_values = values + warp * kWarp * value_stride;
  for (int r = 0; r < unit.rows && split < splits; ++r) {
    const Span s = my_queries[r * unit.heads].span;
    const int length = s.suffix_end - s.suffix_begin;
    const int end = s.suffix_begin + part_begin(length, split + 1, splits);
    for (int at = s.suffix_begin + part_begin(length, split, splits); at < end; at += kWarp) {
      const int some = static_cast<int>(at_most(kWarp, end - at));
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        low[i] = 0;
        high[i] = i / unit.heads == r ? some : 0;
      }
      stage(a, a.index.suffix + at, some, kv_head, own_keys, own_values, lane, kWarp);
      wait_copies();
      __syncwarp();
      attend_keys(a, own_keys, own_values, some, my_numbers, weights, low, high, lane, run);
    }
  }

  // The splits of a unit become one, through the same memory.
  C* const own_part = reinterpret_cast<C*>(own_keys);
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    C sum = run.sum[i];
#pragma unroll
    for (int other = kWarp / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, other);
    if (lane == 0) {
      peaks[warp * kQueries + i] = run.peak[i];
      sums[warp * kQueries + i] = sum;
    }
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const int d = 2 * (lane + kWarp * p);
      if (d < dim) {
        own_part[i * dim + d] = run.out[i][2 * p];
        own_part[i * dim + d + 1] = run.out[i][2 * p + 1];
      }
    }
  }
  __syncthreads();
  for (int m = warp; m < count_queries; m += t.units) {
    const int64_t row = queries[m].row, head = kv_head * t.group + queries[m].head;
    if (row < 0) continue;
    C peak = -INFINITY, sum = 0;
    for (int s = 0; s < splits; ++s) {
      const C theirs = peaks[s * count_queries + m];
      peak = theirs > peak ? theirs : peak;
    }
    for (int s = 0; s < splits; ++s) {
      sum += shrink(peaks[s * count_queries + m], peak) * sums[s * count_queries + m];
    }
    for (int d = lane; d < dim; d += kWarp) {
      C out = 0;
      for (int s = 0; s < splits; ++s) {
        const C* part = reinterpret_cast<const C*>(keys + (s * units + m / kQueries) * kWarp * key_stride);
        out += shrink(peaks[s * count_queries + m], peak) * part[m % kQueries * dim + d];
      }
      store(out / sum, a.out + (row * a.heads + head) * a.dim + d);
    }
  }
}

// A launch of its own before the other: rows of one step see each other's tokens (guesses of a question, a
// prompt's), and only the end of a launch says that all of them are in the pool. Thread block: a row.
template <typename T>
__global__ void append_kernel(const DecodeAttention<T> a) {
  const int64_t row = blockIdx.x;
  const int dim = static_cast<int>(a.dim), size = static_cast<int>(a.kv_heads) * dim;
  const int64_t target = static_cast<int64_t>(a.index.slots[row]) * size;
  for (int n = static_cast<int>(threadIdx.x); n < size; n += static_cast<int>(blockDim.x)) {
    const int64_t head = n / dim, d = n % dim;
    a.k_pool[target + n] = a.k[row * a.k_row + head * a.k_head + d];
    a.v_pool[target + n] = a.v[row * a.v_row + head * a.v_head + d];
  }
}

#endif  // PMC_DEVICE

}  // namespace pmc

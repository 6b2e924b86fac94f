// The CUDA kernels of decode_attention.h, without their launch. They use so few CUDA built-ins that a test
// compiles this file for the CPU and runs it there, thread by thread.
//
// A unit is a row and up to kQueries of the query heads that share a key/value head. kSplits warps share the
// keys that it sees, prompt and suffix as one list. Keys and values go from the pool into registers, 16 bytes
// a lane: 4 KiB a warp at once, 8 keys of 128 bfloat16 with their values. No warp waits for another before
// the end, where the splits of a unit become one in a fixed order.
//
// Why so: a step of 160 rows has few keys for each of a card's warps, and waits for single reads rather than
// for bandwidth. The prompt's keys, which all rows of a question read, come from the card's memory once and
// then from its caches: neighbouring rows share a thread block, whose warps read them at about the same time.
//
// A row's result depends on the row alone, not on which or how many other rows are in the step.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "decode_attention.h"

namespace pmc {

constexpr int kWarp = 32;
constexpr int kQueries = 3;  // of a warp: each number of a key or value that is read serves so many; 4 spill
constexpr int kSplits = 4;   // warps of a unit
static_assert(kQueries <= kSplits, "in the end a warp merges one query");
constexpr int64_t kMaxDim = 256;    // in registers: see Shape
constexpr int64_t kDimStep = 8;     // 16 bytes of bfloat16
constexpr int64_t kPackBytes = 16;  // the widest load
constexpr double kLog2E = 1.4426950408889634;

// How the heads that share a key/value head lie in units: groups up to kQueries in one, larger ones cut in
// equal parts, so that a row's keys are read as few times as possible.
struct Cuts {
  int32_t group, per_row, heads;  // per_row: units; heads: of a unit, the last may have fewer
};

// Factors of queries and of scores, which become powers of two. With a softcap z = softcap * tanh(z /
// softcap).
template <typename C>
struct Scales {
  C query, cap;  // cap 0: none
};

template <typename C, typename T>
Scales<C> scales_of(const DecodeAttention<T>& a) {
  return {static_cast<C>(a.softcap > 0 ? a.scale / a.softcap : a.scale * kLog2E),
          static_cast<C>(a.softcap * kLog2E)};
}

struct Unit {
  int32_t row, head, heads;  // head: the first, of the group
};

PMC_SHARED int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

PMC_SHARED Cuts cuts_of(int64_t group) {
  const int64_t per_row = ceil_div(group, kQueries);
  return {static_cast<int32_t>(group), static_cast<int32_t>(per_row),
          static_cast<int32_t>(ceil_div(group, per_row))};
}

PMC_SHARED Unit unit_of(const Cuts& c, int32_t unit) {
  const int32_t row = unit / c.per_row, head = (unit - row * c.per_row) * c.heads;
  return {row, head, head + c.heads < c.group ? c.heads : c.group - head};
}

// Units of a thread block. Sums of float64 take twice the registers and twice the shared memory.
PMC_SHARED constexpr int units_of_block(int64_t sum_size) { return sum_size == sizeof(float) ? 2 : 1; }

PMC_SHARED constexpr int threads_of_block(int64_t sum_size) {
  return units_of_block(sum_size) * kSplits * kWarp;
}

// Shared memory of a warp, in sums: its queries, and in the same place what it has to merge; then a peak and
// a sum of each query.
PMC_SHARED int64_t sums_of_warp(int64_t dim) { return kQueries * (dim + 2); }

PMC_SHARED int64_t shared_bytes(int64_t dim, int64_t sum_size) {
  return units_of_block(sum_size) * kSplits * sums_of_warp(dim) * sum_size;
}

#ifdef PMC_DEVICE  // in nvcc, or in the test's emulation

// Numbers as one load brings them, a register each 4 bytes: of an array of bfloat16 the compiler would make
// one register a number.
struct alignas(kPackBytes) Pack {
  uint32_t words[kPackBytes / 4];
};

template <typename T>
struct SumOf {
  using Type = T;
};
template <>
struct SumOf<BFloat16> {
  using Type = float;
};

PMC_DEVICE float as_float(uint32_t bits) {
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

PMC_DEVICE float as_sum(float x) { return x; }
PMC_DEVICE double as_sum(double x) { return x; }
PMC_DEVICE float as_sum(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

// Number d of a pack.
template <typename T>
PMC_DEVICE typename SumOf<T>::Type number_of(const Pack& pack, int d) {
  if constexpr (sizeof(T) == sizeof(BFloat16)) {
    return as_float(d % 2 ? pack.words[d / 2] & 0xFFFF0000u : pack.words[d / 2] << 16);
  } else {
    T out;
    memcpy(&out, pack.words + d * sizeof(T) / 4, sizeof out);
    return out;
  }
}

PMC_DEVICE void store(float x, float* out) { *out = x; }
PMC_DEVICE void store(double x, double* out) { *out = x; }
PMC_DEVICE void store(float x, BFloat16* out) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  out->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40  // a NaN stays one
                                           : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// How keys of up to kDim numbers lie in a warp: a team of `lanes` has `keys` keys at once, lane l of it packs
// l, l + lanes and so on of each. The last lanes have none of a shorter key. Scores lie otherwise: of one key
// in `lanes_of_key` lanes each.
template <typename T, int kDim>
struct Shape {
  static constexpr int per_pack = kPackBytes / sizeof(T);
  static constexpr int lanes = kDim / per_pack < kWarp ? kDim / per_pack : kWarp, teams = kWarp / lanes;
  static constexpr int packs = kDim / per_pack / lanes, numbers = packs * per_pack;  // of a lane
  static constexpr int keys = 4 / packs, lanes_of_key = lanes / keys;

  // where pack p of a lane begins in the head
  static PMC_SHARED int place_of(int lane, int p) { return (lane % lanes + p * lanes) * per_pack; }
  // whose score a lane has, and a lane that has a key's
  static PMC_SHARED int key_of(int lane) { return lane % lanes / lanes_of_key; }
  static PMC_SHARED int lane_of(int team, int key) { return team * lanes + key * lanes_of_key; }
};

// A team's online softmax of its queries so far, in powers of two. A lane has its numbers of `out`.
template <typename C, int kHeads, int kNumbers>
struct Running {
  C peak[kHeads], sum[kHeads], out[kHeads][kNumbers];
};

// The peak where nothing was seen yet. Not -infinity: its difference from itself is NaN.
template <typename C>
constexpr C kNothing = std::numeric_limits<C>::lowest();

// The slots that a row sees.
struct Seen {
  const int32_t *prefix, *suffix;
  int shared, count;  // of the prefix; of both
};

PMC_DEVICE int slot_of(const Seen& seen, int key) {  // -1: there are no more
  if (key >= seen.count) return -1;
  return key < seen.shared ? seen.prefix[key] : seen.suffix[key - seen.shared];
}

// The question of a row: the last that begins at or before it. The lanes of a warp look at 32 at once: a
// search by halves would wait for memory five times as often.
PMC_DEVICE int question_of(const StepIndex& index, int64_t row, int lane) {
  int first = 0, count = static_cast<int>(index.blocks);
  while (count > 1) {
    const int step = (count + kWarp - 1) / kWarp, at = lane * step;
    const bool begun = at < count && index.cu_rows[first + at] <= row;
    const int passed = (__popc(__ballot_sync(0xFFFFFFFFu, begun)) - 1) * step;
    first += passed;
    count = count - passed < step ? count - passed : step;
  }
  return first;
}

// From each lane's parts of the scores of its team's keys, the score of key S::key_of(lane): each time half
// of the team takes over half of what is left from the other half. A third of the steps of summing key by
// key.
template <typename S, typename C>
PMC_DEVICE C sum_scores(C (&parts)[S::keys], int lane) {
  int other = S::lanes / 2;
#pragma unroll
  for (int left = S::keys / 2; left > 0; left /= 2, other /= 2) {
    const bool upper = lane & other;
#pragma unroll
    for (int n = 0; n < left; ++n) {
      const C given = upper ? parts[n] : parts[n + left], kept = upper ? parts[n + left] : parts[n];
      parts[n] = kept + __shfl_xor_sync(0xFFFFFFFFu, given, other);
    }
  }
#pragma unroll
  for (; other > 0; other /= 2) parts[0] += __shfl_xor_sync(0xFFFFFFFFu, parts[0], other);
  return parts[0];
}

// One warp, its split's part of the keys: every kSplits-th of those that a warp has at once.
template <typename T, int kDim, int kHeads, typename C, typename S = Shape<T, kDim>>
PMC_DEVICE void attend(const DecodeAttention<T>& a, const Scales<C>& scales, const Seen& seen, int split,
                       int lane, const C (&q)[kHeads][S::numbers], Running<C, kHeads, S::numbers>& run) {
  const int team = lane / S::lanes, pack = lane % S::lanes, packs = static_cast<int>(a.dim) / S::per_pack;
  const int stride = static_cast<int>(a.kv_heads) * packs;
  const Pack* const k = reinterpret_cast<const Pack*>(a.k_pool) + blockIdx.y * packs + pack;
  const Pack* const v = reinterpret_cast<const Pack*>(a.v_pool) + blockIdx.y * packs + pack;
  constexpr int kTogether = S::teams * S::keys;
  int at = split * kTogether;
  int slot = slot_of(seen, at + team * S::keys + S::key_of(lane));
  while (at < seen.count) {
    int slots[S::keys];
#pragma unroll
    for (int n = 0; n < S::keys; ++n) slots[n] = __shfl_sync(0xFFFFFFFFu, slot, S::lane_of(team, n));
    const bool sees = slot >= 0;
    at += kSplits * kTogether;
    slot = slot_of(seen, at + team * S::keys + S::key_of(lane));  // the next, while these come
    Pack key[S::keys][S::packs], value[S::keys][S::packs];
#pragma unroll
    for (int n = 0; n < S::keys; ++n) {
#pragma unroll
      for (int p = 0; p < S::packs; ++p) {
        // Zeros where there is none: of another key or value, 0 times its infinity would be NaN.
        const bool there = slots[n] >= 0 && pack + p * S::lanes < packs;
        const int64_t from = static_cast<int64_t>(slots[n]) * stride + p * S::lanes;
        key[n][p] = load_if(there, k + from);
        value[n][p] = load_if(there, v + from);
      }
    }
    C parts[kHeads][S::keys] = {}, weight[kHeads];
#pragma unroll
    for (int n = 0; n < S::keys; ++n) {
#pragma unroll
      for (int d = 0; d < S::numbers; ++d) {
        const C number = number_of<T>(key[n][d / S::per_pack], d % S::per_pack);
#pragma unroll
        for (int i = 0; i < kHeads; ++i) parts[i][n] += q[i][d] * number;
      }
    }
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      C score = sum_scores<S>(parts[i], lane);
      if (scales.cap > 0) score = scales.cap * std::tanh(score);
      if (!sees) score = -INFINITY;
      C peak = score;
#pragma unroll
      for (int other = S::lanes / 2; other >= S::lanes_of_key; other /= 2) {
        peak = std::fmax(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, other));
      }
      peak = std::fmax(peak, run.peak[i]);
      const C keep = exp2_of(run.peak[i] - peak);
      weight[i] = exp2_of(score - peak);
      run.peak[i] = peak;
      run.sum[i] = run.sum[i] * keep + weight[i];
#pragma unroll
      for (int d = 0; d < S::numbers; ++d) run.out[i][d] *= keep;
    }
#pragma unroll
    for (int n = 0; n < S::keys; ++n) {
      C weights[kHeads];
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        weights[i] = __shfl_sync(0xFFFFFFFFu, weight[i], S::lane_of(team, n));
      }
#pragma unroll
      for (int d = 0; d < S::numbers; ++d) {
        const C number = number_of<T>(value[n][d / S::per_pack], d % S::per_pack);
#pragma unroll
        for (int i = 0; i < kHeads; ++i) run.out[i][d] += weights[i] * number;
      }
    }
  }
}

// The lanes of a team become one of its sum, then the teams of a warp one.
template <typename T, int kDim, int kHeads, typename C, typename S = Shape<T, kDim>>
PMC_DEVICE void merge_teams(Running<C, kHeads, S::numbers>& run) {
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
#pragma unroll
    for (int other = S::lanes_of_key; other < S::lanes; other *= 2) {
      run.sum[i] += __shfl_xor_sync(0xFFFFFFFFu, run.sum[i], other);
    }
#pragma unroll
    for (int other = S::lanes; other < kWarp; other *= 2) {
      const C peak = std::fmax(run.peak[i], __shfl_xor_sync(0xFFFFFFFFu, run.peak[i], other));
      const C keep = exp2_of(run.peak[i] - peak);
      run.peak[i] = peak;
      run.sum[i] *= keep;
      run.sum[i] += __shfl_xor_sync(0xFFFFFFFFu, run.sum[i], other);
#pragma unroll
      for (int d = 0; d < S::numbers; ++d) {
        run.out[i][d] *= keep;
        run.out[i][d] += __shfl_xor_sync(0xFFFFFFFFu, run.out[i][d], other);
      }
    }
  }
}

// One warp: a query's result from what kParts warps have of it, each `apart` numbers behind the one before.
template <int kParts, int kDim, typename C, typename T>
PMC_DEVICE void merge_splits(const C* outs, const C* peaks, const C* sums, int apart, int dim, int lane,
                             T* result) {
  C peak = kNothing<C>, sum = 0, share[kParts];
#pragma unroll
  for (int w = 0; w < kParts; ++w) {
    share[w] = peaks[w * apart];
    peak = std::fmax(peak, share[w]);
  }
#pragma unroll
  for (int w = 0; w < kParts; ++w) {
    share[w] = exp2_of(share[w] - peak);
    sum += share[w] * sums[w * apart];
  }
  const C inverse = 1 / sum;
#pragma unroll
  for (int n = 0; n < kDim / kWarp; ++n) {
    const int d = lane + n * kWarp;
    if (d >= dim) continue;
    C out = 0;
#pragma unroll
    for (int w = 0; w < kParts; ++w) out += share[w] * outs[w * apart + d];
    store(out * inverse, result + d);
  }
}

// Thread block (some units, kv_head), of ceil_div(rows x per_row, units_of_block) x kv_heads; units have up
// to kHeads heads. Two blocks on a multiprocessor hide each other's waits; for more, registers would spill.
template <typename T, int kDim, int kHeads, typename C = typename SumOf<T>::Type>
__global__ void __launch_bounds__(threads_of_block(sizeof(C)), 2)
    decode_attention_kernel(const DecodeAttention<T> a, const Cuts cuts, const Scales<C> scales) {
  using S = Shape<T, kDim>;
  extern __shared__ uint4 decode_shared[];
  const int lane = static_cast<int>(threadIdx.x % kWarp), warp = static_cast<int>(threadIdx.x / kWarp);
  const int split = warp % kSplits, dim = static_cast<int>(a.dim);
  const Unit unit = unit_of(cuts, static_cast<int>(blockIdx.x) * units_of_block(sizeof(C)) + warp / kSplits);
  const bool idle = unit.row >= a.index.rows;  // a unit past the last
  const int head = static_cast<int>(blockIdx.y) * cuts.group + unit.head;
  const int size = static_cast<int>(sums_of_warp(dim));
  C* const own = reinterpret_cast<C*>(decode_shared) + warp * size;
  if (!idle) {
    const Span s = span_of(a.index, unit.row, a.window);
    const int question = question_of(a.index, unit.row, lane), shared = s.prefix_end - s.prefix_begin;
    const Seen seen{a.index.prefix + a.index.cu_prefix[question] + s.prefix_begin,
                    a.index.suffix + s.suffix_begin, shared, shared + (s.suffix_end - s.suffix_begin)};
    // Through shared memory, so that any strides are read in lines. Heads that a unit lacks repeat its first.
    C numbers[kHeads][kDim / kWarp];
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const T* const query = a.q + unit.row * a.q_row + (head + (i < unit.heads ? i : 0)) * a.q_head;
#pragma unroll
      for (int d = 0; d < kDim / kWarp; ++d) {
        const int at = lane + d * kWarp;
        numbers[i][d] = as_sum(query[at < dim ? at : 0]);
      }
    }
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
#pragma unroll
      for (int d = 0; d < kDim / kWarp; ++d) {
        const int at = lane + d * kWarp;
        if (at < dim) own[i * dim + at] = numbers[i][d] * scales.query;
      }
    }
    __syncwarp();
    C q[kHeads][S::numbers];
    Running<C, kHeads, S::numbers> run;
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      run.peak[i] = kNothing<C>;
      run.sum[i] = 0;
#pragma unroll
      for (int d = 0; d < S::numbers; ++d) {
        const int at = S::place_of(lane, d / S::per_pack);
        q[i][d] = at < dim ? own[i * dim + at + d % S::per_pack] : C{0};
        run.out[i][d] = 0;
      }
    }
    attend<T, kDim, kHeads>(a, scales, seen, split, lane, q, run);
    merge_teams<T, kDim, kHeads>(run);
    __syncwarp();  // all have their queries
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (i >= unit.heads || lane >= S::lanes) continue;
      own[kQueries * dim + i] = run.peak[i];
      own[kQueries * (dim + 1) + i] = run.sum[i];
#pragma unroll
      for (int d = 0; d < S::numbers; ++d) {
        const int at = S::place_of(lane, d / S::per_pack);
        if (at < dim) own[i * dim + at + d % S::per_pack] = run.out[i][d];
      }
    }
  }
  __syncthreads();
  const int i = split;
  if (idle || i >= unit.heads) return;
  const C* const parts = own - split * size;  // of the unit's warps
  merge_splits<kSplits, kDim>(parts + i * dim, parts + kQueries * dim + i, parts + kQueries * (dim + 1) + i,
                              size, dim, lane, a.out + (int64_t{unit.row} * a.heads + head + i) * a.dim);
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

// Runs csrc/decode_attention_kernel.h on the CPU: every CUDA thread is a fiber that runs until it waits for
// others. It finds wrong indices, barriers that not all threads reach and copies that nobody waits for (they
// are done only then); with threads run in several orders, also missing barriers. It says nothing about
// speed.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
struct alignas(16) uint4 {
  uint32_t x[4];
};
static Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace pmc {
constexpr size_t kShared = 232448;  // what a block may have on sm_90
uint4 decode_shared[kShared / sizeof(uint4)];
}  // namespace pmc

namespace {

struct Barrier {
  int arrived = 0, count = 0, result = 0;
  int64_t generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[1 << 16]};
  const Barrier* waits = nullptr;
  int64_t until = 0;
  bool done = false;
  std::vector<std::function<void()>> copies;
};

std::vector<Fiber> fibers;
std::vector<Barrier> warps;
std::vector<double> exchanged;  // a number a thread
Barrier block;
ucontext_t scheduler;
std::function<void()> body;

int wait_at(Barrier& barrier, int threads, int predicate) {
  barrier.count += predicate != 0;
  const int64_t generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.result = barrier.count;
    barrier.arrived = barrier.count = 0;
    ++barrier.generation;
  } else {
    Fiber& me = fibers[threadIdx.x];
    me.waits = &barrier;
    me.until = generation + 1;
    swapcontext(&me.context, &scheduler);
    me.waits = nullptr;
  }
  return barrier.result;  // no thread can finish the next round before all have left this one
}

int __syncthreads_count(int predicate) { return wait_at(block, static_cast<int>(blockDim.x), predicate); }
void __syncthreads() { __syncthreads_count(0); }
void __syncwarp() { wait_at(warps[threadIdx.x / 32], 32, 0); }

template <typename T>
T __shfl_xor_sync(unsigned, T mine, int lanes) {
  exchanged[threadIdx.x] = mine;
  __syncwarp();
  const T theirs = static_cast<T>(exchanged[threadIdx.x ^ static_cast<unsigned>(lanes)]);
  __syncwarp();
  return theirs;
}

void run_fiber() {
  body();
  fibers[threadIdx.x].done = true;
  swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

void run_block(std::vector<int>& order, std::mt19937* shuffle) {
  std::memset(pmc::decode_shared, 0xFF, sizeof pmc::decode_shared);  // NaN
  block = {};
  std::fill(warps.begin(), warps.end(), Barrier{});
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    fiber.waits = nullptr;
    fiber.copies.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = 1 << 16;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &run_fiber, 0);
  }
  for (size_t left = fibers.size(); left > 0;) {
    bool moved = false;
    if (shuffle) std::shuffle(order.begin(), order.end(), *shuffle);
    for (int i : order) {
      Fiber& fiber = fibers[i];
      if (fiber.done || (fiber.waits && fiber.waits->generation < fiber.until)) continue;
      threadIdx.x = static_cast<unsigned>(i);
      swapcontext(&scheduler, &fiber.context);
      moved = true;
      left -= fiber.done;
    }
    if (!moved) {
      std::fprintf(stderr, "a barrier that not all threads reach\n");
      std::abort();
    }
  }
}

// seed 0: threads in order; 1: backwards; else in random orders
void launch(unsigned x, unsigned y, unsigned threads, unsigned seed, std::function<void()> kernel) {
  body = std::move(kernel);
  fibers.clear();
  fibers.resize(threads);
  warps.assign(threads / 32, {});
  exchanged.assign(threads, 0);
  gridDim = {x, y, 1};
  blockDim = {threads, 1, 1};
  std::mt19937 random(seed);
  std::vector<int> order(threads);
  for (unsigned i = 0; i < threads; ++i) order[i] = static_cast<int>(seed == 1 ? threads - 1 - i : i);
  for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x) run_block(order, seed > 1 ? &random : nullptr);
  }
}

}  // namespace

#define __global__
#define __shared__
#define __launch_bounds__(...)
#define PMC_DEVICE static inline

namespace pmc {
template <typename P>
PMC_DEVICE void copy_pack(P* shared, const P* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    std::fprintf(stderr, "a copy that is not aligned\n");
    std::abort();
  }
  fibers[threadIdx.x].copies.push_back([=] { *shared = *global; });
}
PMC_DEVICE void wait_copies() {
  for (auto& copy : fibers[threadIdx.x].copies) copy();
  fibers[threadIdx.x].copies.clear();
}
}  // namespace pmc

#include "decode_attention_kernel.h"

namespace {

template <typename T, int kPairs>
void emulate(const pmc::DecodeAttention<T>& a, int64_t limit, unsigned seed) {
  using C = typename pmc::SumOf<T>::Type;
  const int64_t warps = pmc::warps_within(limit, a.dim, sizeof(T), sizeof(C));
  const pmc::Tiling tiling = pmc::tiling_of(a.heads / a.kv_heads, warps);
  launch(static_cast<unsigned>(a.index.rows), 1, 256, seed, [&] { pmc::append_kernel<T>(a); });
  launch(static_cast<unsigned>(pmc::tile_begin(tiling, a.index.rows, a.index.blocks)),
         static_cast<unsigned>(a.kv_heads), static_cast<unsigned>(warps * pmc::kWarp), seed,
         [&] { pmc::decode_attention_kernel<T, kPairs>(a, tiling); });
}

template <typename T>
void emulate(const int64_t* n, const double* x, int64_t limit, unsigned seed) {
  const auto numbers = [&](int i) { return reinterpret_cast<T*>(n[i]); };
  const auto array = [&](int i) { return reinterpret_cast<const int32_t*>(n[i]); };
  const pmc::DecodeAttention<T> a{
      numbers(0),
      numbers(3),
      numbers(6),
      n[1],
      n[2],
      n[4],
      n[5],
      n[7],
      n[8],
      numbers(9),
      numbers(10),
      numbers(11),
      n[12],
      n[13],
      n[14],
      x[0],
      x[1],
      n[15],
      {array(16), array(17), array(18), array(19), array(20), array(21), array(22), n[23], n[24]}};
  if (a.dim > 128) {
    emulate<T, 4>(a, limit, seed);
  } else if (a.dim > 64) {
    emulate<T, 2>(a, limit, seed);
  } else {
    emulate<T, 1>(a, limit, seed);
  }
}

}  // namespace

// n: the arguments of the binding one after another, tuples flat; x: scale and softcap
extern "C" void emulate(int type, const int64_t* n, const double* x, int64_t limit, unsigned seed) {
  if (type == 0) emulate<float>(n, x, limit, seed);
  if (type == 1) emulate<double>(n, x, limit, seed);
  if (type == 2) emulate<pmc::BFloat16>(n, x, limit, seed);
}

extern "C" int64_t tile_begin(int64_t group, int64_t warps, int64_t row, int64_t question) {
  return pmc::tile_begin(pmc::tiling_of(group, warps), row, question);
}

// Fills row and first head of each query of a question, kQueries a unit, -1 where there is none.
extern "C" int64_t queries_of(int64_t group, int64_t warps, int64_t rows, int64_t* row, int64_t* head) {
  const pmc::Tiling t = pmc::tiling_of(group, warps);
  const int64_t units = pmc::unit_count(t, rows);
  for (int64_t m = 0; row && m < units * pmc::kQueries; ++m) {
    const pmc::Unit u = pmc::unit_of(t, rows, m / pmc::kQueries);
    const int64_t i = m % pmc::kQueries;
    row[m] = i < u.rows * u.heads ? u.row + i / u.heads : -1;
    head[m] = i < u.rows * u.heads ? u.head + i % u.heads : -1;
  }
  return units;
}

extern "C" int64_t shared_bytes(int64_t warps, int64_t dim, int64_t size, int64_t sum_size) {
  return pmc::layout_of(warps, dim, size, sum_size).bytes;
}

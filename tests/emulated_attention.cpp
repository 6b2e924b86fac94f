// Runs csrc/decode_attention_kernel.h on the CPU: every CUDA thread is a fiber that runs until it waits for
// others. It finds wrong indices and barriers that not all threads reach; with threads run in several orders,
// also missing barriers. It says nothing about speed.
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
constexpr size_t kShared = 48 << 10;  // what a block may have on any card
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
T __shfl_sync(unsigned, T mine, int lane) {
  exchanged[threadIdx.x] = mine;
  __syncwarp();
  const T theirs = static_cast<T>(exchanged[threadIdx.x / 32 * 32 + static_cast<unsigned>(lane)]);
  __syncwarp();
  return theirs;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T mine, int lanes) {
  return __shfl_sync(mask, mine, static_cast<int>(threadIdx.x % 32) ^ lanes);
}

unsigned __ballot_sync(unsigned, bool mine) {
  unsigned all = 0;
  exchanged[threadIdx.x] = mine;
  __syncwarp();
  for (unsigned lane = 0; lane < 32; ++lane)
    all |= (exchanged[threadIdx.x / 32 * 32 + lane] != 0) * (1u << lane);
  __syncwarp();
  return all;
}
int __popc(unsigned bits) { return __builtin_popcount(bits); }

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
void launch(unsigned x, unsigned y, unsigned threads, size_t bytes, unsigned seed,
            std::function<void()> kernel) {
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
    for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x) {
      run_block(order, seed > 1 ? &random : nullptr);
      const auto* shared = reinterpret_cast<const unsigned char*>(pmc::decode_shared);
      if (std::any_of(shared + bytes, shared + pmc::kShared, [](unsigned char c) { return c != 0xFF; })) {
        std::fprintf(stderr, "shared memory written past its end\n");
        std::abort();
      }
    }
  }
}

}  // namespace

#define __global__
#define __shared__
#define __launch_bounds__(...)
#define PMC_DEVICE static inline

namespace pmc {
template <typename P>
PMC_DEVICE P load_if(bool there, const P* from) {
  if (there && reinterpret_cast<uintptr_t>(from) % 16) {
    std::fprintf(stderr, "a load that is not aligned\n");
    std::abort();
  }
  return there ? *from : P{};
}
template <typename C>
PMC_DEVICE C exp2_of(C x) {
  return std::exp2(x);
}
}  // namespace pmc

#include "decode_attention_kernel.h"

namespace {

template <typename T, int kDim>
void emulate(const pmc::DecodeAttention<T>& a, unsigned seed) {
  using C = typename pmc::SumOf<T>::Type;
  const pmc::Cuts cuts = pmc::cuts_of(a.heads / a.kv_heads);
  const pmc::Scales<C> scales = pmc::scales_of<C>(a);
  const int64_t units = a.index.rows * cuts.per_row;
  launch(static_cast<unsigned>(a.index.rows), 1, 256, 0, seed, [&] { pmc::append_kernel<T>(a); });
  launch(static_cast<unsigned>(pmc::ceil_div(units, pmc::units_of_block(sizeof(C)))),
         static_cast<unsigned>(a.kv_heads), pmc::threads_of_block(sizeof(C)),
         static_cast<size_t>(pmc::shared_bytes(a.dim, sizeof(C))), seed, [&] {
           if (cuts.heads == 1) pmc::decode_attention_kernel<T, kDim, 1>(a, cuts, scales);
           if (cuts.heads == 2) pmc::decode_attention_kernel<T, kDim, 2>(a, cuts, scales);
           if (cuts.heads == 3) pmc::decode_attention_kernel<T, kDim, 3>(a, cuts, scales);
         });
}

template <typename T>
void emulate(const int64_t* n, const double* x, unsigned seed) {
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
    emulate<T, 256>(a, seed);
  } else if (a.dim > 64) {
    emulate<T, 128>(a, seed);
  } else {
    emulate<T, 64>(a, seed);
  }
}

}  // namespace

// n: the arguments of the binding one after another, tuples flat; x: scale and softcap
extern "C" void emulate(int type, const int64_t* n, const double* x, unsigned seed) {
  if (type == 0) emulate<float>(n, x, seed);
  if (type == 1) emulate<double>(n, x, seed);
  if (type == 2) emulate<pmc::BFloat16>(n, x, seed);
}

// Fills row, first head and number of heads of each unit of so many rows, as far as there are.
extern "C" int64_t units_of(int64_t group, int64_t rows, int64_t* row, int64_t* head, int64_t* heads) {
  const pmc::Cuts cuts = pmc::cuts_of(group);
  for (int64_t n = 0; row && n < rows * cuts.per_row; ++n) {
    const pmc::Unit unit = pmc::unit_of(cuts, static_cast<int32_t>(n));
    row[n] = unit.row;
    head[n] = unit.head;
    heads[n] = unit.heads;
  }
  return rows * cuts.per_row;
}

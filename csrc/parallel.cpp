#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace pmc {
namespace {

// libgomp's entry points; LLVM's and Intel's runtimes export the same names.
using ParallelFn = void (*)(void (*)(void*), void*, unsigned, unsigned);
using ThreadNumFn = int (*)();

struct OpenMp {
  ParallelFn parallel = nullptr;
  ThreadNumFn thread_num = nullptr;
  ThreadNumFn num_threads = nullptr;

  OpenMp() {
    parallel = reinterpret_cast<ParallelFn>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    thread_num = reinterpret_cast<ThreadNumFn>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    num_threads = reinterpret_cast<ThreadNumFn>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  }
  bool usable() const { return parallel && thread_num && num_threads; }
};

struct Task {
  int64_t count;
  const std::function<void(int64_t, int64_t)>* body;
  const OpenMp* omp;
};

void run_part(int64_t count, int64_t part, int64_t parts, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t begin = count * part / parts;
  const int64_t end = count * (part + 1) / parts;
  if (begin < end) body(begin, end);
}

void omp_entry(void* data) {
  const Task* task = static_cast<const Task*>(data);
  run_part(task->count, task->omp->thread_num(), task->omp->num_threads(), *task->body);
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t, int64_t)>& body) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    if (count > 0) body(0, count);
    return;
  }
  // looked up at every call that finds none: torch may be loaded after us
  static OpenMp omp;
  if (!omp.usable()) omp = OpenMp();
  if (omp.usable()) {
    Task task{count, &body, &omp};
    omp.parallel(omp_entry, &task, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> workers;
  for (int part = 1; part < threads; ++part) {
    workers.emplace_back([&, part] { run_part(count, part, threads, body); });
  }
  run_part(count, 0, threads, body);
  for (auto& worker : workers) worker.join();
}

}  // namespace pmc

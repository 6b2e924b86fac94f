#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "crowding.h"

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
  std::mutex mutex;
  std::exception_ptr thrown;  // by the first part that did: nothing may leave a thread
  Crowding::Time own_end;     // of the caller's part

  void run_part(int64_t part, int64_t parts) {
    const int64_t begin = count * part / parts;
    const int64_t end = count * (part + 1) / parts;
    try {
      if (begin < end) (*body)(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!thrown) thrown = std::current_exception();
    }
    if (part == 0) own_end = Crowding::Clock::now();
  }
};

void omp_entry(void* data) {
  Task* task = static_cast<Task*>(data);
  task->run_part(task->omp->thread_num(), task->omp->num_threads());
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t, int64_t)>& body) {
  thread_local Crowding crowding;
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  const auto start = Crowding::Clock::now();
  if (threads <= 1 || crowding.alone(start)) {
    if (count > 0) body(0, count);
    return;
  }
  // looked up at every call that finds none: torch may be loaded after us
  static OpenMp omp;
  if (!omp.usable()) omp = OpenMp();
  Task task{count, &body, &omp, {}, {}, {}};
  if (omp.usable()) {
    omp.parallel(omp_entry, &task, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> workers;
    int part = 1;
    try {
      for (; part < threads; ++part)
        workers.emplace_back([&task, part, threads] { task.run_part(part, threads); });
    } catch (const std::system_error&) {  // no more threads are available: this one does the rest
      for (; part < threads; ++part) task.run_part(part, threads);
    }
    task.run_part(0, threads);
    for (auto& worker : workers) worker.join();
  }
  crowding.note(start, task.own_end, Crowding::Clock::now(), threads);
  if (task.thrown) std::rethrow_exception(task.thrown);
}

}  // namespace pmc

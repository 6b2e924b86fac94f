// Splits a range over threads, without a thread pool of our own.
#pragma once

#include <cstdint>
#include <functional>

namespace pmc {

// Calls body(begin, end) for consecutive parts of [0, count), at most `threads` at once, and returns
// when all are done. Uses the OpenMP runtime that this process has loaded already (torch's): a second
// pool would spin against it for the same cores. Without one it starts std::threads. While other programs
// take the cores, the caller does all parts alone (crowding.h): body must compute the same for any parts.
// What body throws, in any thread, is thrown here when all are done.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace pmc

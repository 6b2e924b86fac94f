// Whether other programs take the cores that a caller's threads need.
#pragma once

#include <algorithm>
#include <chrono>

namespace pmc {

// A parallel region ends when its last thread does, and a thread that lost its core comes back a time slice
// later, some milliseconds, while a region of a decode step takes a fraction of one. So after a region whose
// wait was longer than all of its work alone would have been, the caller works alone: for 4 ms, and for twice
// as long each time that the next region of several threads shows the same. What is computed does not depend
// on it.
class Crowding {
 public:
  using Clock = std::chrono::steady_clock;
  using Time = Clock::time_point;
  using Duration = Clock::duration;

  bool alone(Time now) const { return now < until_; }

  // of a region: when it began, when the caller had done its own part, and when all had
  void note(Time start, Time own_end, Time end, int threads) {
    if (end - own_end <= std::max<Duration>(kShortest, (own_end - start) * (threads - 1))) return;
    pause_ = end - until_ > kCalm ? kFirst : std::min<Duration>(2 * pause_, kLast);
    until_ = end + pause_;
  }

 private:
  static constexpr std::chrono::microseconds kShortest{500};  // to wake a thread takes up to 100
  static constexpr std::chrono::milliseconds kFirst{4}, kLast{256};
  static constexpr std::chrono::milliseconds kCalm{50};  // without such a wait: the next one is a first
  Time until_{};
  Duration pause_ = kFirst;
};

}  // namespace pmc

// csrc/crowding.h for ctypes, in nanoseconds of a clock that the test moves.
#include "crowding.h"

namespace {
pmc::Crowding::Time at(long long ns) { return pmc::Crowding::Time(std::chrono::nanoseconds(ns)); }
}  // namespace

extern "C" {
pmc::Crowding* crowding() { return new pmc::Crowding; }
void release(pmc::Crowding* c) { delete c; }
bool alone(const pmc::Crowding* c, long long now) { return c->alone(at(now)); }
void note(pmc::Crowding* c, long long start, long long own_end, long long end, int threads) {
  c->note(at(start), at(own_end), at(end), threads);
}
}

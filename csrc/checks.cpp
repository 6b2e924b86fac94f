#include "checks.h"

#include <cmath>
#include <stdexcept>

namespace pmc {
namespace {

constexpr int64_t kMost = int64_t{1} << 48;  // numbers: more than a process can address
constexpr int kMostThreads = 4096;

[[noreturn]] void refuse(const char* name, const std::string& what) {
  throw std::invalid_argument(std::string(name) + " " + what);
}

void check_stride(const char* name, int64_t rows, int64_t size, int64_t stride) {
  if (rows > 1 && (stride < size || stride > kMost)) {
    refuse(name, "has rows of " + std::to_string(size) + " numbers, " + std::to_string(stride) +
                     " apart: they must not overlap");
  }
}

Memory placed(const char* name, uintptr_t address, int64_t item, int64_t extent) {
  if (extent > kMost) refuse(name, "has more numbers than memory can hold");
  if (extent == 0) return {name, address, 0};
  const uint64_t bytes = static_cast<uint64_t>(extent) * static_cast<uint64_t>(item);
  if (address == 0) refuse(name, "is at address 0: it has " + std::to_string(extent) + " numbers");
  if (address % static_cast<uintptr_t>(item)) refuse(name, "is not aligned to its numbers' size");
  if (address + bytes < address) refuse(name, "reaches past the end of memory");
  return {name, address, static_cast<int64_t>(bytes)};
}

}  // namespace

void check_range(const char* name, int64_t value, int64_t lowest, int64_t highest) {
  if (value < lowest || value > highest) {
    refuse(name, "is " + std::to_string(value) + ": it must be from " + std::to_string(lowest) + " to " +
                     std::to_string(highest));
  }
}

void check_finite(const char* name, double value) {
  if (!std::isfinite(value)) refuse(name, "is " + std::to_string(value) + ": it must be finite");
}

void check_threads(int threads) { check_range("threads", threads, 1, kMostThreads); }

int64_t product_of(const char* name, std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (size < 0) refuse(name, "has a size of " + std::to_string(size) + ": none may be negative");
    if (size > kMost || (product > 0 && size > kMost / product)) {
      refuse(name, "has more numbers than memory can hold");
    }
    product *= size;
  }
  return product;
}

Memory memory_of(const char* name, uintptr_t address, int64_t item, int64_t rows, int64_t size,
                 int64_t stride) {
  if (product_of(name, {rows, size}) == 0) return {name, address, 0};
  check_stride(name, rows, size, stride);
  return placed(name, address, item, rows > 1 ? product_of(name, {rows - 1, stride}) + size : size);
}

Memory memory_of(const char* name, uintptr_t address, int64_t item, int64_t size) {
  return placed(name, address, item, product_of(name, {size}));
}

Memory memory_of(const char* name, uintptr_t address, int64_t item, int64_t rows, int64_t heads, int64_t dim,
                 int64_t row_stride, int64_t head_stride) {
  if (product_of(name, {rows, heads, dim}) == 0) return {name, address, 0};
  // strides of 0 are torch's for expanded tensors, which are read only
  const int64_t extent =
      product_of(name, {rows - 1, row_stride}) + product_of(name, {heads - 1, head_stride}) + dim;
  return placed(name, address, item, extent);
}

void check_apart(const Memory& written, std::initializer_list<Memory> others) {
  for (const Memory& other : others) {
    if (written.bytes == 0 || other.bytes == 0) continue;
    if (written.address < other.address + static_cast<uintptr_t>(other.bytes) &&
        other.address < written.address + static_cast<uintptr_t>(written.bytes)) {
      refuse(written.name, "overlaps " + std::string(other.name) + ", which is read while it is written");
    }
  }
}

template <typename T>
void check_offsets(const char* name, const T* offsets, int64_t count, int64_t most, bool from_zero) {
  bool good = count >= 1 && offsets[0] >= 0 && (offsets[0] == 0 || !from_zero);
  for (int64_t i = 1; i < count; ++i) good &= offsets[i] >= offsets[i - 1];
  if (!good || offsets[count - 1] > most) refuse(name, "must rise from 0 to at most " + std::to_string(most));
}

template <typename T>
void check_values(const char* name, const T* values, int64_t count, int64_t limit) {
  bool good = true;
  for (int64_t i = 0; i < count; ++i) good &= values[i] >= 0 && values[i] < limit;
  if (!good) refuse(name, "has values outside of 0 to " + std::to_string(limit - 1));
}

template void check_offsets<int32_t>(const char*, const int32_t*, int64_t, int64_t, bool);
template void check_offsets<int64_t>(const char*, const int64_t*, int64_t, int64_t, bool);
template void check_values<int32_t>(const char*, const int32_t*, int64_t, int64_t);
template void check_values<int64_t>(const char*, const int64_t*, int64_t, int64_t);

}  // namespace pmc

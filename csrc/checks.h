// Checks of arguments before any memory is touched: sizes, addresses, overlaps.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

namespace pmc {

// All of these throw std::invalid_argument with one line: a ValueError in Python.

// lowest <= value <= highest
void check_range(const char* name, int64_t value, int64_t lowest, int64_t highest);
void check_finite(const char* name, double value);
void check_threads(int threads);

// The product of sizes: none is negative, and it stays far below what overflows.
int64_t product_of(const char* name, std::initializer_list<int64_t> sizes);

// Rows of numbers at an address: an extent of addresses that is not null, aligned and free of overflow.
struct Memory {
  const char* name;
  uintptr_t address;
  int64_t bytes;  // from the first to behind the last
};

// `rows` rows of `size` numbers of `item` bytes, `stride` numbers apart; a null address is refused where
// there is something to read.
Memory memory_of(const char* name, uintptr_t address, int64_t item, int64_t rows, int64_t size,
                 int64_t stride);
Memory memory_of(const char* name, uintptr_t address, int64_t item, int64_t size);
// [rows, heads, dim] with two strides
Memory memory_of(const char* name, uintptr_t address, int64_t item, int64_t rows, int64_t heads, int64_t dim,
                 int64_t row_stride, int64_t head_stride);

// Throws if `written` overlaps any of the others.
void check_apart(const Memory& written, std::initializer_list<Memory> others);

// offsets[0] is at least 0 (exactly 0 if `from_zero`), none falls, and none is above `most`.
template <typename T>
void check_offsets(const char* name, const T* offsets, int64_t count, int64_t most, bool from_zero = true);

// 0 <= values[i] < limit
template <typename T>
void check_values(const char* name, const T* values, int64_t count, int64_t limit);

}  // namespace pmc

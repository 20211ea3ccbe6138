// What the programs that run kernels under the sanitizers share.
#pragma once

#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

namespace {

std::mt19937 generator(0);

template <class T>
std::vector<T> random_values(int64_t count) {
  std::normal_distribution<double> normal;
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(normal(generator));
  return values;
}

int failures = 0;

void check(bool condition, const char* what, int64_t a, int64_t b, int64_t c) {
  if (condition) return;
  ++failures;
  std::printf("%s differs for %ld, %ld, %ld\n", what, long(a), long(b), long(c));
}

// A random pattern of blocks in BCSR order.
struct Pattern {
  int64_t block_rows, block_cols;
  std::vector<int32_t> crow = {0}, col;

  Pattern(int64_t rows, int64_t cols, double density) : block_rows(rows), block_cols(cols) {
    std::bernoulli_distribution keep(density);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        if (keep(generator)) col.push_back(static_cast<int32_t>(c));
      }
      crow.push_back(static_cast<int32_t>(col.size()));
    }
  }
};

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

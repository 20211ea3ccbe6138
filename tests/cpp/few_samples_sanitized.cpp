// The product of few samples with weights of 16 bits under AddressSanitizer and UBSan: every array
// has exactly its size, so a read or a write past an end stops the program. Values are compared
// with plain loops in double.
//
// Usage: few_samples_sanitized <instruction set>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/dispatch.h"
#include "sanitized.h"

namespace {

using fastprune::BFloat16;
using fastprune::Float16;

constexpr int mantissa_bits(BFloat16) { return 7; }
constexpr int mantissa_bits(Float16) { return 10; }

// The number that bits stand for, of IEEE 754's rules.
template <class W>
double value_of(W number) {
  const int mantissa_size = mantissa_bits(W{}), bias = (1 << (14 - mantissa_size)) - 1;
  const int mantissa = number.bits & ((1 << mantissa_size) - 1);
  const int exponent = number.bits >> mantissa_size & (2 * bias + 1);
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_size)
                    : std::ldexp(mantissa + (1 << mantissa_size), exponent - bias - mantissa_size);
  return number.bits >> 15 ? -magnitude : magnitude;
}

// Random numbers below 4, denormal ones among them.
template <class W>
std::vector<W> random_weights(int64_t count) {
  const int largest =
      ((1 << (14 - mantissa_bits(W{}))) << mantissa_bits(W{})) + (1 << mantissa_bits(W{})) - 1;
  std::uniform_int_distribution<int> magnitude(0, largest), sign(0, 1);
  std::vector<W> weights(count);
  for (W& weight : weights) {
    weight.bits = static_cast<uint16_t>(magnitude(generator) | sign(generator) << 15);
  }
  return weights;
}

template <class W>
void test_few_samples(int64_t samples, int64_t in_features, int64_t out_features, int64_t rows,
                      int64_t cols, double density, int64_t chunks) {
  using namespace fastprune;
  const Pattern pattern(ceil_divide(out_features, rows), ceil_divide(in_features, cols), density);
  const auto values = random_weights<W>(int64_t(pattern.col.size()) * rows * cols);
  const auto bias = random_values<float>(out_features);
  const int64_t stride = in_features + 3;
  const auto input = random_values<float>((samples - 1) * stride + in_features);

  MixedBlockProductArgs<float, W> args;
  args.input = {input.data(), samples, in_features, stride};
  args.weight = {values.data(),
                 pattern.crow.data(),
                 pattern.col.data(),
                 nullptr,
                 pattern.block_rows,
                 rows,
                 cols,
                 1,
                 rows};
  args.bias = bias.data();
  args.activation = Activation::kRelu;
  const auto product = few_samples_product_of<W>(cpu_kernels());
  const int64_t total = few_samples_work(args.weight);
  // Each chunk writes to an array of its own: together they must write every output once.
  constexpr float kUntouched = 1e30f;
  bool once = true;
  std::vector<float> output(samples * out_features, kUntouched);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    std::vector<float> part(samples * out_features, kUntouched);
    args.output = {part.data(), samples, out_features, out_features};
    product(args, total * chunk / chunks, total * (chunk + 1) / chunks);
    for (size_t i = 0; i < part.size(); ++i) {
      if (part[i] == kUntouched) continue;
      once &= output[i] == kUntouched;
      output[i] = part[i];
    }
  }
  check(once, "the division of few_samples_product", samples, in_features, out_features);

  bool equal = true;
  for (int64_t n = 0; n < samples; ++n) {
    std::vector<double> wanted(bias.begin(), bias.end()), total_of(out_features, 1.0);
    for (int64_t r = 0; r < pattern.block_rows; ++r) {
      for (int64_t k = pattern.crow[r]; k < pattern.crow[r + 1]; ++k) {
        for (int64_t e = 0; e < rows * cols; ++e) {
          const int64_t i = pattern.col[k] * cols + e / rows, o = r * rows + e % rows;
          if (i >= in_features || o >= out_features) continue;
          const double term = value_of(values[k * rows * cols + e]) * input[n * stride + i];
          wanted[o] += term;
          total_of[o] += std::abs(term);
        }
      }
    }
    for (int64_t o = 0; o < out_features; ++o) {
      const double error = std::abs(std::max(wanted[o], 0.0) - output[n * out_features + o]);
      equal &= error < 1e-5 * total_of[o];
    }
  }
  check(equal, "few_samples_product", samples, in_features, out_features);
}

template <class W>
void test_all() {
  for (int64_t samples : {1, 2, 3, 5, 16, 23}) {
    for (int64_t in_features : {1, 15, 64, 129}) {
      for (int64_t out_features : {1, 17, 151}) {
        for (int64_t rows : {1, 2, 4, 5, 8, 16, 28, 32, 48, 60, 64}) {
          const int64_t cols = rows == 8 ? 1 : rows == 5 ? 3 : 16;
          test_few_samples<W>(samples, in_features, out_features, rows, cols, 0.4, 3);
        }
      }
    }
  }
  test_few_samples<W>(3, 509, 33, 16, 16, 1.0, 5);
  test_few_samples<W>(3, 40, 40, 8, 8, 0.0, 1);
}

}  // namespace

int main(int argc, char** argv) {
  fastprune::set_cpu_isa(argc > 1 ? argv[1] : "");
  test_all<BFloat16>();
  test_all<Float16>();
  std::printf("%s: %d failures\n", fastprune::cpu_kernels().isa, failures);
  return failures == 0 ? 0 : 1;
}

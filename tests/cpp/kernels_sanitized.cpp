// The CPU kernels under AddressSanitizer and UBSan: every array has exactly its size, so a read or
// a write past an end stops the program. Values are compared with plain loops in double.
//
// Usage: kernels_sanitized <instruction set>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/dispatch.h"

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

template <class T>
void test_block_sparse_linear(int64_t samples, int64_t in_features, int64_t out_features,
                              int64_t rows, int64_t cols, double density, int64_t chunks) {
  using namespace fastprune;
  const int64_t block_rows = (out_features + rows - 1) / rows;
  const int64_t block_cols = (in_features + cols - 1) / cols;
  std::vector<int32_t> crow = {0}, col;
  std::bernoulli_distribution keep(density);
  for (int64_t r = 0; r < block_rows; ++r) {
    for (int64_t c = 0; c < block_cols; ++c) {
      if (keep(generator)) col.push_back(static_cast<int32_t>(c));
    }
    crow.push_back(static_cast<int32_t>(col.size()));
  }
  const auto values = random_values<T>(int64_t(col.size()) * rows * cols);
  const auto bias = random_values<T>(out_features);
  const int64_t stride = in_features + 3;
  const auto input = random_values<T>(samples > 0 ? (samples - 1) * stride + in_features : 0);
  std::vector<T> output(samples * out_features);

  BlockSparseLinearArgs<T> args;
  args.input = {input.data(), samples, in_features, stride};
  args.weight = {values.data(), crow.data(), col.data(), block_rows, rows, cols};
  args.bias = bias.data();
  args.output = {output.data(), samples, out_features, out_features};
  args.activation = Activation::kRelu;
  const BlockSparseLinearWork work = plan_block_sparse_linear(args);
  const auto kernel = kernels_of<T>(cpu_kernels()).block_sparse_linear;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    std::vector<T> scratch(work.scratch_size);
    kernel(args, work.total * chunk / chunks, work.total * (chunk + 1) / chunks, scratch.data());
  }

  bool equal = true;
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t o = 0; o < out_features; ++o) {
      double sum = bias[o];
      const int64_t r = o / rows;
      for (int64_t k = crow[r]; k < crow[r + 1]; ++k) {
        for (int64_t c = 0; c < cols && col[k] * cols + c < in_features; ++c) {
          sum += double(input[n * stride + col[k] * cols + c]) *
                 double(values[(k * cols + c) * rows + o % rows]);
        }
      }
      equal &= std::abs(std::max(sum, 0.0) - double(output[n * out_features + o])) < 1e-3;
    }
  }
  check(equal, "block_sparse_linear", samples, in_features, out_features);
}

template <class T>
void test_ablated_cross_entropy(int64_t samples, int64_t features, int64_t classes, double scale) {
  using namespace fastprune;
  auto logits = random_values<T>(samples * classes);
  for (T& logit : logits) logit *= static_cast<T>(scale);
  const auto hidden = random_values<T>(samples * features);
  const auto weight = random_values<T>(classes * features);
  std::vector<int64_t> targets(samples);
  for (int64_t n = 0; n < samples; ++n) targets[n] = n % classes;
  std::vector<int32_t> pieces;
  for (int32_t c = 0; c < classes; c += 3) {
    for (int32_t j = 0; j < features; j += 2) {
      pieces.insert(pieces.end(),
                    {c, std::min<int32_t>(c + 3, classes), j, std::min<int32_t>(j + 2, features)});
    }
  }
  pieces.insert(pieces.end(),
                {0, static_cast<int32_t>(classes), 0, static_cast<int32_t>(features)});

  AblatedCrossEntropyArgs<T> args;
  args.logits = {logits.data(), samples, classes, classes};
  args.hidden = {hidden.data(), samples, features, features};
  args.weight = {weight.data(), classes, features, features};
  args.targets = targets.data();
  args.sample_weight = nullptr;
  args.pieces = pieces.data();
  args.num_pieces = int64_t(pieces.size()) / 4;
  args.padded_samples = (samples + kSamplePadding - 1) / kSamplePadding * kSamplePadding;
  const int64_t chunks = ablated_cross_entropy_chunks(samples);
  std::vector<T> probabilities(classes * args.padded_samples);
  std::vector<T> hidden_transposed(features * args.padded_samples);
  std::vector<T> padded_weight(args.padded_samples);
  std::vector<double> partial_sums(chunks * args.num_pieces);
  args.probabilities = probabilities.data();
  args.hidden_transposed = hidden_transposed.data();
  args.padded_weight = padded_weight.data();
  args.partial_sums = partial_sums.data();
  const auto& kernels = kernels_of<T>(cpu_kernels());
  kernels.ablated_cross_entropy_prepare(args, 0, args.padded_samples);
  kernels.ablated_cross_entropy(args, 0, chunks * args.num_pieces);

  bool equal = true;
  for (int64_t m = 0; m < args.num_pieces; ++m) {
    const int32_t* piece = pieces.data() + 4 * m;
    double wanted = 0.0, found = 0.0, total = 1.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      found += partial_sums[chunk * args.num_pieces + m];
    for (int64_t n = 0; n < samples; ++n) {
      double largest = -1e300, masked_largest = -1e300, sum = 0.0, masked_sum = 0.0;
      std::vector<double> before(classes), after(classes);
      for (int64_t c = 0; c < classes; ++c) {
        before[c] = after[c] = logits[n * classes + c];
        for (int64_t j = piece[2]; c >= piece[0] && c < piece[1] && j < piece[3]; ++j) {
          after[c] -= double(hidden[n * features + j]) * double(weight[c * features + j]);
        }
        largest = std::max(largest, before[c]);
        masked_largest = std::max(masked_largest, after[c]);
      }
      for (int64_t c = 0; c < classes; ++c) {
        sum += std::exp(before[c] - largest);
        masked_sum += std::exp(after[c] - masked_largest);
      }
      const double delta = std::log(masked_sum) + masked_largest - after[targets[n]] -
                           (std::log(sum) + largest - before[targets[n]]);
      wanted += delta;
      total += std::abs(delta);
    }
    equal &= std::abs(wanted - found) < 1e-5 * total;
  }
  check(equal, "ablated_cross_entropy", samples, features, classes);
}

template <class T>
void test_all() {
  for (int64_t samples : {0, 1, 5, 17, 200}) {
    for (int64_t in_features : {1, 15, 64, 129}) {
      for (int64_t out_features : {1, 17, 151}) {
        for (int64_t rows : {1, 5, 8, 16, 48}) {
          const int64_t cols = rows == 8 ? 1 : rows == 5 ? 3 : 16;
          test_block_sparse_linear<T>(samples, in_features, out_features, rows, cols, 0.4, 3);
        }
      }
    }
  }
  test_block_sparse_linear<T>(29, 509 + 512, 33, 16, 16, 0.3, 2);  // rows 1024 apart are copied
  test_block_sparse_linear<T>(29, 512 - 3, 33, 16, 16, 1.0, 5);
  test_block_sparse_linear<T>(3, 40, 40, 8, 8, 0.0, 1);
  for (int64_t samples : {1, 15, 17, 300}) {
    for (double scale : {1.0, 200.0}) {
      test_ablated_cross_entropy<T>(samples, 9, 7, scale);
      test_ablated_cross_entropy<T>(samples, 1, 2, scale);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  fastprune::set_cpu_isa(argc > 1 ? argv[1] : "");
  test_all<float>();
  test_all<double>();
  std::printf("%s: %d failures\n", fastprune::cpu_kernels().isa, failures);
  return failures == 0 ? 0 : 1;
}

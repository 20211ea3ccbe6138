// The CPU kernels under AddressSanitizer and UBSan: every array has exactly its size, so a read or
// a write past an end stops the program. Values are compared with plain loops in double.
//
// Usage: kernels_sanitized <instruction set>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/dispatch.h"
#include "sanitized.h"
#include "transposed_structure.h"

namespace {

// The product with a weight in BCSR order, or, by its block columns, with its transpose.
template <class T>
void test_block_product(int64_t samples, int64_t in_features, int64_t out_features, int64_t rows,
                        int64_t cols, double density, int64_t chunks, bool transposed) {
  using namespace fastprune;
  const Pattern pattern(ceil_divide(out_features, rows), ceil_divide(in_features, cols), density);
  const auto values = random_values<T>(int64_t(pattern.col.size()) * rows * cols);
  const int64_t from = transposed ? out_features : in_features;
  const int64_t to = transposed ? in_features : out_features;
  const auto bias = random_values<T>(to);
  const int64_t stride = from + 3;
  const auto input = random_values<T>(samples > 0 ? (samples - 1) * stride + from : 0);
  const TransposedStructure by_column = transpose_structure(pattern.crow.data(), pattern.col.data(),
                                                            pattern.block_rows, pattern.block_cols);

  BlockProductArgs<T> args;
  args.input = {input.data(), samples, from, stride};
  if (transposed) {
    args.weight = {values.data(),
                   by_column.offsets.data(),
                   by_column.sources.data(),
                   by_column.blocks.data(),
                   pattern.block_cols,
                   cols,
                   rows,
                   rows,
                   1};
  } else {
    args.weight = {values.data(),
                   pattern.crow.data(),
                   pattern.col.data(),
                   nullptr,
                   pattern.block_rows,
                   rows,
                   cols,
                   1,
                   rows};
  }
  args.bias = bias.data();
  args.output = {nullptr, samples, to, to};
  args.activation = Activation::kRelu;
  const auto& kernels = kernels_of<T>(cpu_kernels());
  const BlockProductWork work = kernels.plan_block_product(args, chunks);
  // Each chunk writes to an array of its own: together they must write every output once.
  constexpr T kUntouched = T(1e30);
  bool once = true;
  std::vector<T> output(samples * to, kUntouched);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    std::vector<T> part(samples * to, kUntouched);
    args.output = {part.data(), samples, to, to};
    std::vector<T> scratch(work.scratch_size);
    kernels.block_product(args, work, work.total * chunk / chunks,
                          work.total * (chunk + 1) / chunks, scratch.data());
    for (int64_t i = 0; i < samples * to; ++i) {
      if (part[i] == kUntouched) continue;
      once &= output[i] == kUntouched;
      output[i] = part[i];
    }
  }
  check(once, "the division of block_product", samples, in_features, out_features);

  std::vector<double> wanted(samples * to);
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t o = 0; o < to; ++o) wanted[n * to + o] = bias[o];
    for (int64_t r = 0; r < pattern.block_rows; ++r) {
      for (int64_t k = pattern.crow[r]; k < pattern.crow[r + 1]; ++k) {
        for (int64_t e = 0; e < rows * cols; ++e) {
          const int64_t i = pattern.col[k] * cols + e / rows, o = r * rows + e % rows;
          if (i >= in_features || o >= out_features) continue;
          wanted[n * to + (transposed ? i : o)] += double(values[k * rows * cols + e]) *
                                                   double(input[n * stride + (transposed ? o : i)]);
        }
      }
    }
  }
  bool equal = true;
  for (int64_t i = 0; i < samples * to; ++i) {
    equal &= std::abs(std::max(wanted[i], 0.0) - double(output[i])) < 1e-3;
  }
  check(equal, transposed ? "transposed block_product" : "block_product", samples, in_features,
        out_features);
}

template <class T>
void test_weight_gradient(int64_t samples, int64_t in_features, int64_t out_features, int64_t rows,
                          int64_t cols, double density, int64_t chunks) {
  using namespace fastprune;
  const Pattern pattern(ceil_divide(out_features, rows), ceil_divide(in_features, cols), density);
  const auto input = random_values<T>(samples * in_features);
  const auto grad_output = random_values<T>(samples * out_features);
  std::vector<T> grad_values(int64_t(pattern.col.size()) * rows * cols, T{7});

  BlockSparseLinearWeightGradientArgs<T> args;
  args.input = {input.data(), samples, in_features, in_features};
  args.grad_output = {grad_output.data(), samples, out_features, out_features};
  args.crow_indices = pattern.crow.data();
  args.col_indices = pattern.col.data();
  args.block_rows = pattern.block_rows;
  args.rows = rows;
  args.cols = cols;
  args.grad_values = grad_values.data();
  const auto& kernels = kernels_of<T>(cpu_kernels());
  const BlockSparseLinearWeightGradientWork work = kernels.plan_weight_gradient(args);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t begin = work.total * chunk / chunks, end = work.total * (chunk + 1) / chunks;
    if (begin == end) continue;
    std::vector<T> scratch(work.scratch_size);
    kernels.weight_gradient(args, work, begin, end, scratch.data());
  }

  bool equal = true;
  for (int64_t r = 0; r < pattern.block_rows; ++r) {
    for (int64_t k = pattern.crow[r]; k < pattern.crow[r + 1]; ++k) {
      for (int64_t e = 0; e < rows * cols; ++e) {
        const int64_t i = pattern.col[k] * cols + e / rows, o = r * rows + e % rows;
        double sum = 0.0;
        for (int64_t n = 0; n < samples && i < in_features && o < out_features; ++n) {
          sum += double(input[n * in_features + i]) * double(grad_output[n * out_features + o]);
        }
        equal &= std::abs(sum - double(grad_values[k * rows * cols + e])) < 1e-3;
      }
    }
  }
  check(equal, "weight_gradient", samples, in_features, out_features);
}

double cross_entropy(const std::vector<double>& logits, int64_t target) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (double logit : logits) sum += std::exp(logit - largest);
  return std::log(sum) + largest - logits[target];
}

// Blocks of rows x cols that cover a weight, and the whole of it.
std::vector<int32_t> block_pieces(int64_t weight_rows, int64_t weight_cols, int32_t rows,
                                  int32_t cols) {
  const auto last_row = static_cast<int32_t>(weight_rows);
  const auto last_col = static_cast<int32_t>(weight_cols);
  std::vector<int32_t> pieces = {0, last_row, 0, last_col};
  for (int32_t r = 0; r < last_row; r += rows) {
    for (int32_t c = 0; c < last_col; c += cols) {
      pieces.insert(pieces.end(),
                    {r, std::min(r + rows, last_row), c, std::min(c + cols, last_col)});
    }
  }
  return pieces;
}

template <class T>
void test_ablated_cross_entropy(int64_t samples, int64_t features, int64_t classes, int64_t rows,
                                double scale) {
  using namespace fastprune;
  auto logits = random_values<T>(samples * classes);
  for (T& logit : logits) logit *= static_cast<T>(scale);
  const auto hidden = random_values<T>(samples * features);
  const auto weight = random_values<T>(classes * features);
  std::vector<int64_t> targets(samples);
  for (int64_t n = 0; n < samples; ++n) targets[n] = n % classes;
  const std::vector<int32_t> pieces =
      block_pieces(classes, features, static_cast<int32_t>(rows), features == 1 ? 1 : 2);

  AblatedCrossEntropyArgs<T> args;
  args.logits = {logits.data(), samples, classes, classes};
  args.hidden = {hidden.data(), samples, features, features};
  args.weight = {weight.data(), classes, features, features};
  args.targets = targets.data();
  args.sample_weight = nullptr;
  args.pieces = pieces.data();
  args.num_pieces = int64_t(pieces.size()) / 4;
  args.span = samples_per_span(samples, args.num_pieces);
  const int64_t spans = ceil_divide(samples, args.span);
  std::vector<double> partial_sums(spans * args.num_pieces);
  args.partial_sums = partial_sums.data();
  const auto& kernels = kernels_of<T>(cpu_kernels());
  std::vector<T> scratch(kernels.ablated_cross_entropy_scratch(args));
  kernels.ablated_cross_entropy(args, 0, spans * args.num_pieces, scratch.data());

  bool equal = true;
  for (int64_t m = 0; m < args.num_pieces; ++m) {
    const int32_t* piece = pieces.data() + 4 * m;
    double wanted = 0.0, found = 0.0, total = 1.0;
    for (int64_t span = 0; span < spans; ++span) {
      found += partial_sums[span * args.num_pieces + m];
    }
    for (int64_t n = 0; n < samples; ++n) {
      std::vector<double> before(classes), after(classes);
      for (int64_t c = 0; c < classes; ++c) {
        before[c] = after[c] = logits[n * classes + c];
        for (int64_t j = piece[2]; c >= piece[0] && c < piece[1] && j < piece[3]; ++j) {
          after[c] -= double(hidden[n * features + j]) * double(weight[c * features + j]);
        }
      }
      const double delta = cross_entropy(after, targets[n]) - cross_entropy(before, targets[n]);
      wanted += delta;
      total += std::abs(delta);
    }
    equal &= std::abs(wanted - found) < 1e-5 * total;
  }
  check(equal, "ablated_cross_entropy", samples, features, classes);
}

template <class T>
void test_ablated_mlp_cross_entropy(int64_t samples, int64_t features, int64_t hidden,
                                    int64_t classes, int32_t rows, double scale) {
  using namespace fastprune;
  const auto input = random_values<T>(samples * features);
  const auto pre_activation = random_values<T>(samples * hidden);
  const auto first = random_values<T>(hidden * features);
  auto second = random_values<T>(classes * hidden);
  for (T& weight : second) weight *= static_cast<T>(scale);
  const auto logits = random_values<T>(samples * classes);
  std::vector<int64_t> targets(samples);
  for (int64_t n = 0; n < samples; ++n) targets[n] = n % classes;
  const std::vector<int32_t> pieces = block_pieces(hidden, features, rows, 2);

  AblatedMlpCrossEntropyArgs<T> args;
  args.logits = {logits.data(), samples, classes, classes};
  args.input = {input.data(), samples, features, features};
  args.pre_activation = {pre_activation.data(), samples, hidden, hidden};
  args.first_weight = {first.data(), hidden, features, features};
  args.second_weight = {second.data(), classes, hidden, hidden};
  args.targets = targets.data();
  args.sample_weight = nullptr;
  args.pieces = pieces.data();
  args.num_pieces = int64_t(pieces.size()) / 4;
  args.activation = Activation::kRelu;
  args.span = samples_per_span(samples, args.num_pieces);
  const int64_t spans = ceil_divide(samples, args.span);
  std::vector<double> partial_sums(spans * args.num_pieces);
  args.partial_sums = partial_sums.data();
  const auto& kernels = kernels_of<T>(cpu_kernels());
  std::vector<T> scratch(kernels.ablated_mlp_cross_entropy_scratch(args));
  kernels.ablated_mlp_cross_entropy(args, 0, spans * args.num_pieces, scratch.data());

  bool equal = true;
  for (int64_t m = 0; m < args.num_pieces; ++m) {
    const int32_t* piece = pieces.data() + 4 * m;
    double wanted = 0.0, found = 0.0, total = 1.0;
    for (int64_t span = 0; span < spans; ++span) {
      found += partial_sums[span * args.num_pieces + m];
    }
    for (int64_t n = 0; n < samples; ++n) {
      const T* row = logits.data() + n * classes;
      const std::vector<double> before(row, row + classes);
      std::vector<double> after = before;
      for (int64_t r = piece[0]; r < piece[1]; ++r) {
        const double unit = pre_activation[n * hidden + r];
        double masked = unit;
        for (int64_t j = piece[2]; j < piece[3]; ++j) {
          masked -= double(input[n * features + j]) * double(first[r * features + j]);
        }
        const double difference = std::max(unit, 0.0) - std::max(masked, 0.0);
        for (int64_t c = 0; c < classes; ++c) after[c] -= difference * second[c * hidden + r];
      }
      const double delta = cross_entropy(after, targets[n]) - cross_entropy(before, targets[n]);
      wanted += delta;
      total += std::abs(delta);
    }
    equal &= std::abs(wanted - found) < 1e-5 * total;
  }
  check(equal, "ablated_mlp_cross_entropy", samples, features, hidden);
}

template <class T>
void test_ablate_linear(int64_t samples, int64_t in_features, int64_t out_features, int32_t rows) {
  using namespace fastprune;
  const auto input = random_values<T>(samples * in_features);
  const auto output = random_values<T>(samples * out_features);
  const auto weight = random_values<T>(out_features * in_features);
  const std::vector<int32_t> pieces = block_pieces(out_features, in_features, rows, 7);
  AblateLinearArgs<T> args;
  args.input = {input.data(), samples, in_features, in_features};
  args.output = {output.data(), samples, out_features, out_features};
  args.weight = {weight.data(), out_features, in_features, in_features};
  args.pieces = pieces.data();
  args.num_pieces = int64_t(pieces.size()) / 4;
  std::vector<T> masked(args.num_pieces * samples * out_features, T(1e30));
  args.masked = masked.data();
  const auto& kernels = kernels_of<T>(cpu_kernels());
  std::vector<T> scratch(kernels.ablate_linear_scratch(args));
  const int64_t total = args.num_pieces * samples;
  kernels.ablate_linear(args, 0, total / 3, scratch.data());
  kernels.ablate_linear(args, total / 3, total, scratch.data());

  bool equal = true;
  for (int64_t i = 0; i < total * out_features; ++i) {
    const int32_t* piece = pieces.data() + 4 * (i / out_features / samples);
    const int64_t n = i / out_features % samples, r = i % out_features;
    double wanted = output[n * out_features + r];
    for (int64_t j = piece[2]; r >= piece[0] && r < piece[1] && j < piece[3]; ++j) {
      wanted -= double(input[n * in_features + j]) * double(weight[r * in_features + j]);
    }
    equal &= std::abs(wanted - double(masked[i])) < 1e-3;
  }
  check(equal, "ablate_linear", samples, in_features, out_features);
}

template <class T>
void test_all() {
  for (int64_t samples : {1, 5, 17, 200}) {
    for (int64_t in_features : {1, 15, 64, 129}) {
      for (int64_t out_features : {1, 17, 151}) {
        for (int64_t rows : {1, 5, 8, 16, 48}) {
          test_ablate_linear<T>(samples > 17 ? 17 : samples, in_features, out_features,
                                static_cast<int32_t>(rows));
          const int64_t cols = rows == 8 ? 1 : rows == 5 ? 3 : 16;
          test_block_product<T>(samples, in_features, out_features, rows, cols, 0.4, 3, false);
          test_block_product<T>(samples, in_features, out_features, rows, cols, 0.4, 3, true);
          test_weight_gradient<T>(samples, in_features, out_features, rows, cols, 0.4, 3);
        }
      }
    }
  }
  test_block_product<T>(29, 509, 33, 16, 16, 1.0, 5, false);
  test_block_product<T>(3, 40, 40, 8, 8, 0.0, 1, false);
  test_block_product<T>(3, 40, 40, 8, 8, 0.0, 1, true);
  for (int64_t samples : {1, 15, 17, 300}) {
    for (double scale : {1.0, 200.0}) {
      test_ablated_cross_entropy<T>(samples, 9, 7, 3, scale);
      test_ablated_cross_entropy<T>(samples, 1, 2, 2, scale);
      test_ablated_cross_entropy<T>(samples, 1, 33, 33, scale);
      test_ablated_mlp_cross_entropy<T>(samples, 9, 17, 7, 8, scale);
      test_ablated_mlp_cross_entropy<T>(samples, 3, 5, 2, 1, scale);
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

// ablated_mlp_cross_entropy on the CPU; formula and contract are in
// ../ablated_mlp_cross_entropy.h.
//
// A chunk of samples is transposed to panels [feature][sample]. For a piece and three vectors of
// samples, all in the first-level cache but the inputs:
//   u          = first weight of the piece x inputs of its columns       product_tile
//   difference = f(z) - f(z - u), in place                               activation_difference
//   d          = second weight of the piece's rows x difference          product_tile
//   sum       += weighted_deltas(d)
#include "../ablated_mlp_cross_entropy.h"

#include "activation_difference.h"
#include "cross_entropy_delta.h"
#include "product_tile.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {
namespace {

// The arrays in scratch memory.
template <class T>
struct Workspace {
  SampleChunk<T> chunk;
  T* input;           // [in_features][kSamplesPerChunk]
  T* pre_activation;  // [hidden][kSamplesPerChunk]
  T* difference;      // [hidden][kGroup]
  T* logit_loss;      // [classes][kGroup]
  T* unit_weight;     // [classes], padded to two vectors: of the piece's row where it is one
};

template <class T>
Workspace<T> make_workspace(const AblatedMlpCrossEntropyArgs<T>& args, T* scratch) {
  Workspace<T> work;
  work.chunk = make_sample_chunk(args.logits, scratch);
  work.input = scratch;
  work.pre_activation = work.input + args.input.cols * kSamplesPerChunk;
  work.difference = work.pre_activation + args.pre_activation.cols * kSamplesPerChunk;
  work.logit_loss = work.difference + args.pre_activation.cols * kGroup<T>;
  work.unit_weight = work.logit_loss + args.logits.cols * kGroup<T>;
  return work;
}

// f(z) - f(z - u) in the place of u, for rows of a group.
template <class T, Activation activation>
void activate_differences(const T* pre_activation, int64_t rows, T* difference) {
  using V = Vec<T, kLanes<T>>;
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < kGroup<T>; v += kLanes<T>) {
      const V z = load<V>(pre_activation + r * kSamplesPerChunk + v);
      T* u = difference + r * kGroup<T> + v;
      store(u, activation_difference<T, kLanes<T>>(z, load<V>(u), activation));
    }
  }
}

template <class T>
void activate_differences(Activation activation, const T* pre_activation, int64_t rows,
                          T* difference) {
  switch (activation) {
    case Activation::kNone:
      return activate_differences<T, Activation::kNone>(pre_activation, rows, difference);
    case Activation::kRelu:
      return activate_differences<T, Activation::kRelu>(pre_activation, rows, difference);
    case Activation::kRelu6:
      return activate_differences<T, Activation::kRelu6>(pre_activation, rows, difference);
    case Activation::kGelu:
      return activate_differences<T, Activation::kGelu>(pre_activation, rows, difference);
    case Activation::kGeluTanh:
      return activate_differences<T, Activation::kGeluTanh>(pre_activation, rows, difference);
    case Activation::kSilu:
      return activate_differences<T, Activation::kSilu>(pre_activation, rows, difference);
  }
}

template <class T>
double ablate_piece(const AblatedMlpCrossEntropyArgs<T>& args, const Piece& piece,
                    const Workspace<T>& work) {
  const int64_t rows = piece.row_end - piece.row_begin, cols = piece.col_end - piece.col_begin;
  if (rows == 0 || cols == 0) return 0.0;
  const int64_t classes = args.logits.cols;
  const MatrixView<const T>&first = args.first_weight, &second = args.second_weight;
  for (int64_t c = 0; rows == 1 && c < classes; ++c) {
    work.unit_weight[c] = second.data[c * second.row_stride + piece.row_begin];
  }
  Vec<double, kLanes<T>> total = {};
  for (int64_t group = 0; group < work.chunk.width; group += kGroup<T>) {
    product(work.input + piece.col_begin * kSamplesPerChunk + group, kSamplesPerChunk,
            first.data + piece.row_begin * first.row_stride + piece.col_begin, first.row_stride,
            rows, cols, work.difference, kGroup<T>);
    activate_differences(args.activation,
                         work.pre_activation + piece.row_begin * kSamplesPerChunk + group, rows,
                         work.difference);
    if (rows == 1) {
      const ScaledWeights<T> losses = {work.difference, work.unit_weight, 0, classes, {}, {}};
      for (int v = 0; v < kGroup<T>; v += kLanes<T>) {
        total += weighted_deltas(work.chunk, losses, group + v, v);
      }
      continue;
    }
    product(work.difference, kGroup<T>, second.data + piece.row_begin, second.row_stride, classes,
            rows, work.logit_loss, kGroup<T>);
    const LogitLosses<T> losses = {work.logit_loss, kGroup<T>, 0, classes, nullptr, {}};
    for (int v = 0; v < kGroup<T>; v += kLanes<T>) {
      total += weighted_deltas(work.chunk, losses, group + v, v);
    }
  }
  double result = 0.0;
  for (int lane = 0; lane < kLanes<T>; ++lane) result += total[lane];
  return result;
}

}  // namespace

template <class T>
int64_t ablated_mlp_cross_entropy_scratch(const AblatedMlpCrossEntropyArgs<T>& args) {
  const int64_t classes = args.logits.cols, hidden = args.pre_activation.cols;
  return sample_chunk_scratch<T>(classes) + (args.input.cols + hidden) * kSamplesPerChunk +
         (hidden + classes) * kGroup<T> + classes + 2 * kLanes<T>;
}

// Positions [begin, end) of the grid [span][piece], pieces innermost.
template <class T>
void ablated_mlp_cross_entropy(const AblatedMlpCrossEntropyArgs<T>& args, int64_t begin,
                               int64_t end, T* scratch) {
  Workspace<T> work = make_workspace(args, scratch);
  for_each_chunk(
      args, begin, end,
      [&](int64_t first_sample) {
        SampleChunk<T>& chunk = work.chunk;
        load_sample_chunk(chunk, args.targets, args.sample_weight, first_sample, kGroup<T>);
        load_panel(args.input, chunk.begin, chunk.end, chunk.width, work.input);
        load_panel(args.pre_activation, chunk.begin, chunk.end, chunk.width, work.pre_activation);
      },
      [&](int64_t index) { return ablate_piece(args, read_piece(args.pieces, index), work); });
}

template int64_t ablated_mlp_cross_entropy_scratch(const AblatedMlpCrossEntropyArgs<float>&);
template int64_t ablated_mlp_cross_entropy_scratch(const AblatedMlpCrossEntropyArgs<double>&);
template void ablated_mlp_cross_entropy(const AblatedMlpCrossEntropyArgs<float>&, int64_t, int64_t,
                                        float*);
template void ablated_mlp_cross_entropy(const AblatedMlpCrossEntropyArgs<double>&, int64_t, int64_t,
                                        double*);

}  // namespace FASTPRUNE_CPU_NAMESPACE
}  // namespace fastprune

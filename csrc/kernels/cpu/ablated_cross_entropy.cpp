// ablated_cross_entropy on the CPU; formula and contract are in ../ablated_cross_entropy.h.
//
// A chunk of samples is transposed to panels [feature][sample]. For a piece and three vectors of
// samples:
//   d    = weight of the piece x hidden units of its columns    product_tile
//   sum += weighted_deltas(d)
// A single column of all classes takes neither products nor memory for d.
#include "../ablated_cross_entropy.h"

#include "cross_entropy_delta.h"
#include "product_tile.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {
namespace {

// The arrays in scratch memory.
template <class T>
struct Workspace {
  SampleChunk<T> chunk;
  T* hidden;             // [features][kSamplesPerChunk]
  T* logit_loss;         // [classes][kGroup]
  T* other_probability;  // [kSamplesPerChunk], of the classes outside the piece's rows
  T* column;             // [classes], padded to two vectors: the weights of a single column
};

template <class T>
Workspace<T> make_workspace(const AblatedCrossEntropyArgs<T>& args, T* scratch) {
  Workspace<T> work;
  work.chunk = make_sample_chunk(args.logits, scratch);
  work.hidden = scratch;
  work.logit_loss = work.hidden + args.hidden.cols * kSamplesPerChunk;
  work.other_probability = work.logit_loss + args.logits.cols * kGroup<T>;
  work.column = work.other_probability + kSamplesPerChunk;
  return work;
}

// Summed class by class, since 1 - p would lose the digits of a small rest.
template <class T>
void sum_other_probabilities(const Workspace<T>& work, const Piece& piece, int64_t classes) {
  for (int64_t n = 0; n < work.chunk.width; ++n) work.other_probability[n] = T{0};
  for (int64_t c = 0; c < classes; ++c) {
    if (c >= piece.row_begin && c < piece.row_end) continue;
    const T* probability = work.chunk.probability + c * kSamplesPerChunk;
    for (int64_t n = 0; n < work.chunk.width; ++n) work.other_probability[n] += probability[n];
  }
}

template <class T>
double ablate_piece(const AblatedCrossEntropyArgs<T>& args, const Piece& piece,
                    const Workspace<T>& work) {
  const int64_t rows = piece.row_end - piece.row_begin, cols = piece.col_end - piece.col_begin;
  const int64_t classes = args.logits.cols;
  if (rows == 0 || cols == 0) return 0.0;
  const T* weight = args.weight.data + piece.row_begin * args.weight.row_stride + piece.col_begin;
  const T* hidden = work.hidden + piece.col_begin * kSamplesPerChunk;
  Vec<double, kLanes<T>> total = {};
  if (rows == classes && cols == 1) {
    for (int64_t c = 0; c < classes; ++c) work.column[c] = weight[c * args.weight.row_stride];
    const ScaledWeights<T> losses = {hidden, work.column, 0, classes, {}, {}};
    for (int64_t n = 0; n < work.chunk.width; n += kLanes<T>) {
      total += weighted_deltas(work.chunk, losses, n, n);
    }
  } else {
    const T* others = rows == classes ? nullptr : work.other_probability;
    const LogitLosses<T> losses = {work.logit_loss, kGroup<T>, piece.row_begin,
                                   piece.row_end,   others,    {}};
    for (int64_t group = 0; group < work.chunk.width; group += kGroup<T>) {
      product(hidden + group, kSamplesPerChunk, weight, args.weight.row_stride, rows, cols,
              work.logit_loss, kGroup<T>);
      for (int v = 0; v < kGroup<T>; v += kLanes<T>) {
        total += weighted_deltas(work.chunk, losses, group + v, v);
      }
    }
  }
  double result = 0.0;
  for (int lane = 0; lane < kLanes<T>; ++lane) result += total[lane];
  return result;
}

}  // namespace

template <class T>
int64_t ablated_cross_entropy_scratch(const AblatedCrossEntropyArgs<T>& args) {
  const int64_t classes = args.logits.cols;
  return sample_chunk_scratch<T>(classes) + (args.hidden.cols + 1) * kSamplesPerChunk +
         classes * kGroup<T> + classes + 2 * kLanes<T>;
}

// Positions [begin, end) of the grid [span][piece], pieces innermost.
template <class T>
void ablated_cross_entropy(const AblatedCrossEntropyArgs<T>& args, int64_t begin, int64_t end,
                           T* scratch) {
  Workspace<T> work = make_workspace(args, scratch);
  // Neighbouring pieces mostly mask the same classes, and share what is left of the probability.
  int64_t known_chunk = -1;
  Piece known = {};
  for_each_chunk(
      args, begin, end,
      [&](int64_t first_sample) {
        load_sample_chunk(work.chunk, args.targets, args.sample_weight, first_sample, kGroup<T>);
        load_panel(args.hidden, work.chunk.begin, work.chunk.end, work.chunk.width, work.hidden);
      },
      [&](int64_t index) {
        const Piece piece = read_piece(args.pieces, index);
        const bool same_rows = piece.row_begin == known.row_begin && piece.row_end == known.row_end;
        if (!same_rows || known_chunk != work.chunk.begin) {
          sum_other_probabilities(work, piece, args.logits.cols);
        }
        known_chunk = work.chunk.begin;
        known = piece;
        return ablate_piece(args, piece, work);
      });
}

template int64_t ablated_cross_entropy_scratch(const AblatedCrossEntropyArgs<float>&);
template int64_t ablated_cross_entropy_scratch(const AblatedCrossEntropyArgs<double>&);
template void ablated_cross_entropy(const AblatedCrossEntropyArgs<float>&, int64_t, int64_t,
                                    float*);
template void ablated_cross_entropy(const AblatedCrossEntropyArgs<double>&, int64_t, int64_t,
                                    double*);

}  // namespace FASTPRUNE_CPU_NAMESPACE
}  // namespace fastprune

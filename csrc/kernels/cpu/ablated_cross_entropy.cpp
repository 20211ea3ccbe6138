// ablated_cross_entropy on the CPU; formula and contract are in ../ablated_cross_entropy.h.
//
// Vectors run over samples, so any number of classes and any rectangle fills them:
//   prepare: probabilities and hidden units, transposed to [feature][sample]
//   ablate:  for a piece and a chunk of samples, per vector of samples
//              d_t  = sum_j hidden[j] * weight[target][j], gathered, if the target's row is masked
//              sum += p_c * expm1(d_t - d_c) for the masked classes c,
//              sum += (probability of all other classes) * expm1(d_t)
//   reduce:  the partial sums of the chunks, in order
#include "../ablated_cross_entropy.h"

#include "vec.h"

namespace fastprune {
namespace FASTPRUNE_CPU_NAMESPACE {
namespace {

// Past these, expm1 or log1p could overflow or lose digits: the sample takes the plain formula.
constexpr double kLargestExponent = 60.0;
constexpr double kSmallestSum = -0.9;

struct Piece {
  int64_t row_begin, row_end, col_begin, col_end;
};

// The plain formula in double, for one sample.
template <class T>
double loss_delta(const AblatedCrossEntropyArgs<T>& args, const Piece& piece, int64_t sample) {
  const T* logits = args.logits.data + sample * args.logits.row_stride;
  const T* hidden = args.hidden.data + sample * args.hidden.row_stride;
  const int64_t target = args.targets[sample];
  const auto masked_logit = [&](int64_t c) {
    double logit = logits[c];
    if (c >= piece.row_begin && c < piece.row_end) {
      const T* weight = args.weight.data + c * args.weight.row_stride;
      for (int64_t j = piece.col_begin; j < piece.col_end; ++j) {
        logit -= static_cast<double>(hidden[j]) * static_cast<double>(weight[j]);
      }
    }
    return logit;
  };
  double largest = logits[0], masked_largest = masked_logit(0);
  for (int64_t c = 1; c < args.logits.cols; ++c) {
    const double masked = masked_logit(c);
    if (logits[c] > largest) largest = logits[c];
    if (masked > masked_largest) masked_largest = masked;
  }
  double sum = 0.0, masked_sum = 0.0;
  for (int64_t c = 0; c < args.logits.cols; ++c) {
    sum += ::exp(logits[c] - largest);
    masked_sum += ::exp(masked_logit(c) - masked_largest);
  }
  return (::log(masked_sum) + masked_largest - masked_logit(target)) -
         (::log(sum) + largest - static_cast<double>(logits[target]));
}

// What masking takes from the logit of class c, for Lanes samples.
template <class T, int Lanes>
inline Vec<T, Lanes> logit_loss(const AblatedCrossEntropyArgs<T>& args, const Piece& piece,
                                int64_t c, const T* hidden) {
  using V = Vec<T, Lanes>;
  const T* weight = args.weight.data + c * args.weight.row_stride;
  V result = {};
  for (int64_t j = piece.col_begin; j < piece.col_end; ++j) {
    result += load<V>(hidden + j * args.padded_samples) * broadcast<V>(weight[j]);
  }
  return result;
}

// The same for each sample's target. The same operations in the same order as logit_loss, so
// that the target's own term of the sum is exactly zero.
template <class T, int Lanes>
inline Vec<T, Lanes> target_loss(const AblatedCrossEntropyArgs<T>& args, const Piece& piece,
                                 const int64_t* targets, const T* hidden) {
  using V = Vec<T, Lanes>;
  V result = {};
  for (int64_t j = piece.col_begin; j < piece.col_end; ++j) {
    V weight;
    for (int lane = 0; lane < Lanes; ++lane) {
      weight[lane] = args.weight.data[targets[lane] * args.weight.row_stride + j];
    }
    result += load<V>(hidden + j * args.padded_samples) * weight;
  }
  if (piece.row_begin == 0 && piece.row_end == args.logits.cols) return result;
  for (int lane = 0; lane < Lanes; ++lane) {
    if (targets[lane] < piece.row_begin || targets[lane] >= piece.row_end) result[lane] = T{0};
  }
  return result;
}

// What the pieces of one chunk of samples share.
template <class T>
struct Chunk {
  int64_t begin;
  int64_t end;
  int64_t targets[kSamplesPerChunk];      // 0 where padded
  T other_probability[kSamplesPerChunk];  // of the classes outside the piece's rows
};

template <class T, int Lanes>
double ablate_piece(const AblatedCrossEntropyArgs<T>& args, const Piece& piece,
                    const Chunk<T>& chunk) {
  using V = Vec<T, Lanes>;
  const bool all_rows = piece.row_begin == 0 && piece.row_end == args.logits.cols;
  Vec<double, Lanes> total = {};
  double plain_total = 0.0;
  for (int64_t sample = chunk.begin; sample < chunk.end; sample += Lanes) {
    const T* hidden = args.hidden_transposed + sample;
    const T* probability = args.probabilities + sample;
    const V limit = broadcast<V>(T{80});
    const V target =
        target_loss<T, Lanes>(args, piece, chunk.targets + (sample - chunk.begin), hidden);
    V sum = {}, largest = {};
    for (int64_t c = piece.row_begin; c < piece.row_end; ++c) {
      const V exponent = target - logit_loss<T, Lanes>(args, piece, c, hidden);
      largest = maximum(largest, exponent);
      const V change = expm1_clamped<Lanes>(minimum(limit, maximum(-limit, exponent)));
      sum += load<V>(probability + c * args.padded_samples) * change;
    }
    if (!all_rows) {
      largest = maximum(largest, target);
      const V change = expm1_clamped<Lanes>(minimum(limit, maximum(-limit, target)));
      sum += load<V>(chunk.other_probability + (sample - chunk.begin)) * change;
    }
    V delta = log1p_clamped<Lanes>(maximum(sum, broadcast<V>(T(kSmallestSum))));
    // A comparison that NaN fails: NaN samples take the plain formula too, and stay NaN.
    bool safe = true;
    for (int lane = 0; lane < Lanes; ++lane) {
      safe &= largest[lane] < T(kLargestExponent) && sum[lane] > T(kSmallestSum);
    }
    if (!safe) {
      for (int lane = 0; lane < Lanes; ++lane) {
        if (largest[lane] < T(kLargestExponent) && sum[lane] > T(kSmallestSum)) continue;
        delta[lane] = T{0};
        const int64_t n = sample + lane;
        if (n >= args.logits.rows) continue;
        const double weight = args.padded_weight[n];
        if (weight != 0.0) plain_total += weight * loss_delta(args, piece, n);
      }
    }
    using Double = Vec<double, Lanes>;
    total += __builtin_convertvector(load<V>(args.padded_weight + sample), Double) *
             __builtin_convertvector(delta, Double);
  }
  double result = plain_total;
  for (int lane = 0; lane < Lanes; ++lane) result += total[lane];
  return result;
}

Piece read_piece(const int32_t* pieces, int64_t index) {
  const int32_t* piece = pieces + 4 * index;
  return {piece[0], piece[1], piece[2], piece[3]};
}

}  // namespace

// Samples [begin, end) of the padded samples.
template <class T>
void ablated_cross_entropy_prepare(const AblatedCrossEntropyArgs<T>& args, int64_t begin,
                                   int64_t end) {
  const int64_t classes = args.logits.cols, features = args.hidden.cols;
  for (int64_t n = begin; n < end; ++n) {
    const bool real = n < args.logits.rows;
    args.padded_weight[n] = !real ? T{0} : args.sample_weight ? args.sample_weight[n] : T{1};
    if (!real) {
      for (int64_t c = 0; c < classes; ++c) args.probabilities[c * args.padded_samples + n] = 0;
      continue;
    }
    const T* logits = args.logits.data + n * args.logits.row_stride;
    double largest = logits[0];
    for (int64_t c = 1; c < classes; ++c) largest = logits[c] > largest ? logits[c] : largest;
    double sum = 0.0;
    for (int64_t c = 0; c < classes; ++c) sum += ::exp(logits[c] - largest);
    for (int64_t c = 0; c < classes; ++c) {
      args.probabilities[c * args.padded_samples + n] =
          static_cast<T>(::exp(logits[c] - largest) / sum);
    }
  }
  // Sixteen features at a time: a cache line of each sample's row is read whole.
  for (int64_t first = 0; first < features; first += 16) {
    const int64_t last = first + 16 < features ? first + 16 : features;
    for (int64_t n = begin; n < end; ++n) {
      const T* row = args.hidden.data + n * args.hidden.row_stride;
      for (int64_t j = first; j < last; ++j) {
        args.hidden_transposed[j * args.padded_samples + n] = n < args.hidden.rows ? row[j] : T{0};
      }
    }
  }
}

// Positions [begin, end) of the grid [sample chunk][piece], pieces innermost.
template <class T>
void ablated_cross_entropy(const AblatedCrossEntropyArgs<T>& args, int64_t begin, int64_t end) {
  Chunk<T> chunk = {};
  int64_t known_chunk = -1;
  Piece known = {};
  for (int64_t position = begin; position < end; ++position) {
    const Piece piece = read_piece(args.pieces, position % args.num_pieces);
    const int64_t index = position / args.num_pieces;
    const bool new_chunk = index != known_chunk;
    if (new_chunk) {
      chunk.begin = index * kSamplesPerChunk;
      const int64_t next = chunk.begin + kSamplesPerChunk;
      chunk.end = next < args.padded_samples ? next : args.padded_samples;
      for (int64_t n = chunk.begin; n < chunk.end; ++n) {
        chunk.targets[n - chunk.begin] = n < args.logits.rows ? args.targets[n] : 0;
      }
    }
    // Neighbouring pieces mostly mask the same classes: what is left of the probability is
    // summed once for them, class by class, since 1 - p would lose the digits of a small rest.
    if (new_chunk || piece.row_begin != known.row_begin || piece.row_end != known.row_end) {
      for (T& probability : chunk.other_probability) probability = 0;
      for (int64_t c = 0; c < args.logits.cols; ++c) {
        if (c >= piece.row_begin && c < piece.row_end) continue;
        const T* probability = args.probabilities + c * args.padded_samples;
        for (int64_t n = chunk.begin; n < chunk.end; ++n) {
          chunk.other_probability[n - chunk.begin] += probability[n];
        }
      }
    }
    known_chunk = index;
    known = piece;
    args.partial_sums[position] = ablate_piece<T, kLanes<T>>(args, piece, chunk);
  }
}

template void ablated_cross_entropy_prepare(const AblatedCrossEntropyArgs<float>&, int64_t,
                                            int64_t);
template void ablated_cross_entropy_prepare(const AblatedCrossEntropyArgs<double>&, int64_t,
                                            int64_t);
template void ablated_cross_entropy(const AblatedCrossEntropyArgs<float>&, int64_t, int64_t);
template void ablated_cross_entropy(const AblatedCrossEntropyArgs<double>&, int64_t, int64_t);

}  // namespace FASTPRUNE_CPU_NAMESPACE
}  // namespace fastprune

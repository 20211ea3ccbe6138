// The change of the cross-entropy of a chunk of samples, from what masking takes from their logits:
// the formula of ../ablated_cross_entropy.h, with vectors along the samples, so that any number of
// classes fills them.
#pragma once

#include "../cross_entropy_pieces.h"
#include "../types.h"
#include "transpose.h"
#include "vec.h"

namespace fastprune {
namespace {

// Past these, expm1 or log1p could overflow or lose digits: the sample takes the plain formula.
constexpr double kLargestExponent = 60.0;
constexpr double kSmallestSum = -0.9;

struct Piece {
  int64_t row_begin, row_end, col_begin, col_end;
};

inline Piece read_piece(const int32_t* pieces, int64_t index) {
  const int32_t* piece = pieces + 4 * index;
  return {piece[0], piece[1], piece[2], piece[3]};
}

// A chunk of samples, in scratch memory; arrays of samples are padded to whole groups.
template <class T>
struct SampleChunk {
  int64_t begin, end;        // samples of the batch
  int64_t width;             // end - begin, padded
  IntOf<T>* targets;         // [kSamplesPerChunk], 0 where padded
  T* sample_weight;          // [kSamplesPerChunk], 0 where padded
  T* logits;                 // [classes][kSamplesPerChunk]
  T* probability;            // [classes][kSamplesPerChunk], 0 where padded
  MatrixView<const T> rows;  // the batch's logits
};

template <class T>
constexpr int64_t sample_chunk_scratch(int64_t classes) {
  return (2 + 2 * classes) * kSamplesPerChunk;
}

// Takes its arrays from scratch, and moves the pointer past them.
template <class T>
SampleChunk<T> make_sample_chunk(const MatrixView<const T>& logits, T*& scratch) {
  SampleChunk<T> chunk = {};
  chunk.rows = logits;
  chunk.targets = reinterpret_cast<IntOf<T>*>(scratch);
  chunk.sample_weight = scratch + kSamplesPerChunk;
  chunk.logits = scratch + 2 * kSamplesPerChunk;
  chunk.probability = chunk.logits + logits.cols * kSamplesPerChunk;
  scratch += sample_chunk_scratch<T>(logits.cols);
  return chunk;
}

// Samples [begin, end) of a matrix to panel[feature][kSamplesPerChunk], zero up to width.
template <class T>
void load_panel(const MatrixView<const T>& matrix, int64_t begin, int64_t end, int64_t width,
                T* panel) {
  transpose<T, true>(matrix.data + begin * matrix.row_stride, matrix.row_stride, end - begin,
                     matrix.cols, panel, kSamplesPerChunk);
  if (end - begin == width) return;
  for (int64_t j = 0; j < matrix.cols; ++j) {
    for (int64_t n = end - begin; n < width; ++n) panel[j * kSamplesPerChunk + n] = T{0};
  }
}

// softmax of the chunk's logits.
template <class T>
void compute_probabilities(const SampleChunk<T>& chunk, int64_t classes) {
  constexpr int kLanesOf = kLanes<T>;
  using V = Vec<T, kLanesOf>;
  using Double = Vec<double, kLanesOf>;
  const V lowest = broadcast<V>(sizeof(T) == 4 ? T{-87} : T{-700});
  for (int64_t n = 0; n < chunk.width; n += kLanesOf) {
    const T* logits = chunk.logits + n;
    T* probability = chunk.probability + n;
    V largest = load<V>(logits);
    for (int64_t c = 1; c < classes; ++c) {
      largest = maximum(load<V>(logits + c * kSamplesPerChunk), largest);
    }
    Double sum = {};
    for (int64_t c = 0; c < classes; ++c) {
      const V logit = load<V>(logits + c * kSamplesPerChunk);
      const V x = logit - largest;
      // What the subtraction rounds off (Knuth, The Art of Computer Programming 2, 4.2.2, theorem
      // B): it would be a relative error of x times that of T.
      const V back = x + largest;
      const V lost = (logit - back) + ((back - x) - largest);
      V e = exp_clamped<kLanesOf>(maximum(lowest, x));
      e = x < lowest ? V{} : e + e * lost;
      store(probability + c * kSamplesPerChunk, e);
      sum += __builtin_convertvector(e, Double);
    }
    const V inverse = __builtin_convertvector(1.0 / sum, V);
    for (int64_t c = 0; c < classes; ++c) {
      const V e = load<V>(probability + c * kSamplesPerChunk);
      store(probability + c * kSamplesPerChunk, e * inverse);
    }
  }
  for (int64_t c = 0; c < classes; ++c) {
    for (int64_t n = chunk.end - chunk.begin; n < chunk.width; ++n) {
      chunk.probability[c * kSamplesPerChunk + n] = T{0};
    }
  }
}

// Samples [begin, begin + kSamplesPerChunk), or fewer at the end.
template <class T>
void load_sample_chunk(SampleChunk<T>& chunk, const int64_t* targets, const T* sample_weight,
                       int64_t begin, int64_t group) {
  const int64_t left = chunk.rows.rows - begin;
  const int64_t samples = left < kSamplesPerChunk ? left : kSamplesPerChunk;
  chunk.begin = begin;
  chunk.end = begin + samples;
  chunk.width = (samples + group - 1) / group * group;
  for (int64_t n = 0; n < chunk.width; ++n) {
    const bool real = n < samples;
    chunk.targets[n] = real ? static_cast<IntOf<T>>(targets[begin + n]) : 0;
    chunk.sample_weight[n] = !real ? T{0} : sample_weight ? sample_weight[begin + n] : T{1};
  }
  load_panel(chunk.rows, chunk.begin, chunk.end, chunk.width, chunk.logits);
  compute_probabilities(chunk, chunk.rows.cols);
}

// What masking takes from the logits of classes [class_begin, class_end), and 0 from the others:
// loss[class - class_begin][loss_stride], for the samples of a group.
template <class T>
struct LogitLosses {
  static constexpr int kLanesOf = kLanes<T>;
  using V = Vec<T, kLanesOf>;
  const T* loss;
  int64_t loss_stride, class_begin, class_end;
  const T* other_probability;  // [chunk], of the classes that are not masked; null where all are
  V target_loss;

  void start(const IntOf<T>* targets, int64_t sample) {
    for (int lane = 0; lane < kLanesOf; ++lane) {
      const int64_t target = targets[lane];
      const bool masked = target >= class_begin && target < class_end;
      target_loss[lane] =
          masked ? loss[(target - class_begin) * loss_stride + sample + lane] : T{0};
    }
  }
  // d_t - d_c, exactly 0 for the target itself.
  V exponent(int64_t c, int64_t sample) const {
    return target_loss - load<V>(loss + (c - class_begin) * loss_stride + sample);
  }
  V other_exponent() const { return target_loss; }
  double of(int64_t c, int64_t sample) const {
    if (c < class_begin || c >= class_end) return 0.0;
    return loss[(c - class_begin) * loss_stride + sample];
  }
};

// The same where all classes are masked and their losses are one value for each sample times one
// weight for each class: no loss is stored, and no target's loss is gathered where the weights fit
// in two vectors.
template <class T>
struct ScaledWeights {
  static constexpr int kLanesOf = kLanes<T>;
  using V = Vec<T, kLanesOf>;
  static constexpr const T* other_probability = nullptr;
  const T* value;   // [samples of the group]
  const T* weight;  // [classes], padded to two vectors
  int64_t class_begin, class_end;
  V scale, target_weight;

  void start(const IntOf<T>* targets, int64_t sample) {
    scale = load<V>(value + sample);
#if defined(__AVX2__) && !defined(__clang__)
    if (class_end <= 2 * kLanesOf) {
      target_weight = __builtin_shuffle(load<V>(weight), load<V>(weight + kLanesOf),
                                        load<Vec<IntOf<T>, kLanesOf>>(targets));
      return;
    }
#endif
    for (int lane = 0; lane < kLanesOf; ++lane) target_weight[lane] = weight[targets[lane]];
  }
  V exponent(int64_t c, int64_t) const { return scale * (target_weight - weight[c]); }
  V other_exponent() const { return V{}; }
  double of(int64_t c, int64_t sample) const {
    return static_cast<double>(value[sample]) * static_cast<double>(weight[c]);
  }
};

// The plain formula in double, for one sample: `sample` of the chunk, `place` of the losses.
template <class T, class Losses>
double plain_delta(const SampleChunk<T>& chunk, const Losses& losses, int64_t sample,
                   int64_t place) {
  const int64_t classes = chunk.rows.cols;
  const T* logits = chunk.rows.data + (chunk.begin + sample) * chunk.rows.row_stride;
  const auto masked_logit = [&](int64_t c) { return logits[c] - losses.of(c, place); };
  double largest = logits[0], masked_largest = masked_logit(0);
  for (int64_t c = 1; c < classes; ++c) {
    const double masked = masked_logit(c);
    if (logits[c] > largest) largest = logits[c];
    if (masked > masked_largest) masked_largest = masked;
  }
  double sum = 0.0, masked_sum = 0.0;
  for (int64_t c = 0; c < classes; ++c) {
    sum += ::exp(logits[c] - largest);
    masked_sum += ::exp(masked_logit(c) - masked_largest);
  }
  const int64_t target = chunk.targets[sample];
  return (::log(masked_sum) + masked_largest - masked_logit(target)) -
         (::log(sum) + largest - static_cast<double>(logits[target]));
}

// The weighted deltas of one vector of samples: `sample` of the chunk, `place` of the losses.
template <class T, class Losses>
inline Vec<double, kLanes<T>> weighted_deltas(const SampleChunk<T>& chunk, Losses losses,
                                              int64_t sample, int64_t place) {
  constexpr int kLanesOf = kLanes<T>;
  using V = Vec<T, kLanesOf>;
  using Double = Vec<double, kLanesOf>;
  const V limit = broadcast<V>(T{80});
  const T* probability = chunk.probability + sample;
  losses.start(chunk.targets + sample, place);
  V sum = {}, largest = {};
  for (int64_t c = losses.class_begin; c < losses.class_end; ++c) {
    const V exponent = losses.exponent(c, place);
    largest = maximum(largest, exponent);
    const V change = expm1_clamped<kLanesOf>(minimum(limit, maximum(-limit, exponent)));
    sum += load<V>(probability + c * kSamplesPerChunk) * change;
  }
  if (losses.other_probability != nullptr) {
    const V exponent = losses.other_exponent();
    largest = maximum(largest, exponent);
    const V change = expm1_clamped<kLanesOf>(minimum(limit, maximum(-limit, exponent)));
    sum += load<V>(losses.other_probability + sample) * change;
  }
  const V smallest = broadcast<V>(T(kSmallestSum));
  Double delta = __builtin_convertvector(log1p_clamped<kLanesOf>(maximum(sum, smallest)), Double);
  const Double weight = __builtin_convertvector(load<V>(chunk.sample_weight + sample), Double);
  // Comparisons that NaN fails: NaN samples take the plain formula too, and stay NaN.
  const auto safe = (largest < T(kLargestExponent)) & (sum > smallest);
  if (!all_lanes(safe)) {
    for (int lane = 0; lane < kLanesOf; ++lane) {
      if (safe[lane]) continue;
      const bool counts = sample + lane < chunk.end - chunk.begin && weight[lane] != 0.0;
      delta[lane] = counts ? plain_delta(chunk, losses, sample + lane, place + lane) : 0.0;
    }
  }
  return weight * delta;
}

// Walks positions [begin, end) of the grid [span][piece]: load(sample) takes in the chunk that
// begins with a sample, delta(piece) gives a piece's sum over that chunk.
template <class Args, class Load, class Delta>
void for_each_chunk(const Args& args, int64_t begin, int64_t end, const Load& load_chunk,
                    const Delta& delta) {
  const int64_t samples = args.logits.rows, num_pieces = args.num_pieces, span = args.span;
  while (begin < end) {
    const int64_t index = begin / num_pieces, first = begin % num_pieces;
    const int64_t left = end - begin;
    const int64_t last = left < num_pieces - first ? first + left : num_pieces;
    double* sums = args.partial_sums + index * num_pieces;
    for (int64_t m = first; m < last; ++m) sums[m] = 0.0;
    const int64_t span_end = (index + 1) * span < samples ? (index + 1) * span : samples;
    for (int64_t sample = index * span; sample < span_end; sample += kSamplesPerChunk) {
      load_chunk(sample);
      for (int64_t m = first; m < last; ++m) sums[m] += delta(m);
    }
    begin += last - first;
  }
}

}  // namespace
}  // namespace fastprune

// The adapter's forward on the CPU. A tile of tokens goes through both products while it lies in the cache: x is read
// from memory once, out written once, and of what lies between only the (tokens, bottleneck) `hidden` leaves.
#include "adapter/adapter_backward.h"
#include "adapter/adapter_tile.h"

namespace lwft::LWFT_ISA {
namespace {

template <class E, class X>
class Forward {
  using T = SumOf<E>;
  using L = LeftOf<E>;

 public:
  explicit Forward(const AdapterForward& p)
      : p_(p),
        d_(p.model_dim),
        m_(p.bottleneck),
        norm_weight_(p.norm_weight ? parameter_row(p.param_dtype, p.norm_weight, d_, T{1}, scratch_) : nullptr),
        norm_bias_(p.norm_weight ? parameter_row(p.param_dtype, p.norm_bias, d_, T{0}, scratch_) : nullptr),
        down_bias_(parameter_row(p.param_dtype, p.down_bias, m_, T{0}, scratch_)),
        up_bias_(parameter_row(p.param_dtype, p.up_bias, d_, T{0}, scratch_)),
        streams_(may_stream<T>(p.dtype, p.out, p.tokens, d_)) {}

  void run() {
    if constexpr (kPanelsAreRows<E>) {
      if (p_.tokens <= kFewTokens) return run_few();
    }
    const Weights in_place{operand_in_place<L>(p_.param_dtype, p_.down_weight, 0, d_, d_),
                           operand_in_place<L>(p_.param_dtype, p_.up_weight, 0, m_, m_)};
    if (p_.tokens <= kTokensPerBottleneck * m_ && in_place.down.data != nullptr && in_place.up.data != nullptr) {
      return run_transposed(in_place);
    }
    run_tiles();
  }

 private:
  // Z = N Wd^T + bd, N = LayerNorm(X);  out = residual + dropout(scale * (act(Z) Wu^T + bu)), tile by tile.
  void run_tiles() {
    const Tiles tiles = token_tiles<E>(p_.tokens, d_);
    const bool shared = shares_packs(tiles);
    const PackedWeight<E> down(p_.param_dtype, p_.down_weight, 1, d_, d_, m_, shared, scratch_);
    const PackedWeight<E> up(p_.param_dtype, p_.up_weight, 1, m_, m_, d_, shared, scratch_);
    pack(down, up);
    parallel_for(tiles.count, [&](int64_t tile) {
      const int64_t begin = tiles.begin(tile), rows = tiles.size(tile);
      const int64_t z_stride = padded<T>(m_), h_stride = kIsPair<E> ? buffer_stride<L>(units<E>(m_)) : z_stride;
      Scratch scratch;
      const Tile<L> input = input_rows(begin, rows, scratch);
      T* z = scratch.take<T>(rows * z_stride);
      L* h = nullptr;
      if constexpr (kIsPair<E>) {
        h = scratch.take<L>(rows * h_stride);
      } else {
        h = z;
      }
      down.multiply(rows, input, 0, m_, z, z_stride);
      bottleneck_rows(begin, rows, z, z_stride, h, h_stride);
      const auto activated = left_of_several<E>({h, h_stride}, rows, m_, scratch);
      T* y = scratch.take<T>(rows * kBlockColumns);
      for (int64_t j = 0; j < d_; j += kBlockColumns) {
        const int64_t columns = minimum(kBlockColumns, d_ - j);
        up.multiply(rows, activated, j, columns, y, kBlockColumns);
        branch_rows(begin, rows, j, columns, y);
      }
      if (streams_) finish_streaming();
    });
  }

  // The same transposed, Z^T = Wd N^T and Y^T = Wu act(Z)^T: the weights are left-hand sides, which need no packing, and it
  // is the tokens that are turned around twice. Packing costs more where there are not many more of them than the
  // bottleneck is wide; and what one thread packs another has to fetch out of its cache. (T = 128, d = 768, m = 256 on 2
  // threads of a Xeon: 565 us packed.)
  struct Weights {
    Tile<L> down, up;
  };
  static constexpr int64_t kTokensPerBottleneck = 2;
  // Up to so many tokens the threads share the weights, else the tokens.
  static constexpr int64_t kSharedTokens = 64;

  void run_transposed(const Weights& weights) {
    const int64_t tokens = p_.tokens;
    if (thread_count() > 1 && tokens <= kSharedTokens) {
      const Tile<L> input = input_rows(0, tokens, scratch_);
      T* zt = scratch_.take<T>(m_ * padded<T>(tokens));
      const Tiles slices = tiles_of(m_, slice_rows(tokens, d_, kTileMultiple<E>));
      parallel_for(slices.count, [&](int64_t slice) {
        down_transposed(weights, input, tokens, slices.begin(slice), slices.size(slice), zt);
      });
      const E* ht = bottleneck_transposed(0, tokens, zt, scratch_);
      const int64_t columns = slice_rows(tokens, m_, kBlockColumns);
      parallel_for(ceil_div(d_, columns), [&](int64_t slice) {
        up_transposed(weights, ht, 0, tokens, slice * columns, minimum((slice + 1) * columns, d_));
      });
      return;
    }
    const Tiles tiles = token_tiles<E>(tokens, d_);
    parallel_for(tiles.count, [&](int64_t tile) {
      const int64_t begin = tiles.begin(tile), rows = tiles.size(tile);
      Scratch scratch;
      const Tile<L> input = input_rows(begin, rows, scratch);
      T* zt = scratch.take<T>(m_ * padded<T>(rows));
      down_transposed(weights, input, rows, 0, m_, zt);
      up_transposed(weights, bottleneck_transposed(begin, rows, zt, scratch), begin, rows, 0, d_);
      if (streams_) finish_streaming();
    });
  }

  // Rows of a weight for one task: about as many operations as make up for waking a thread.
  static int64_t slice_rows(int64_t tokens, int64_t depth, int64_t multiple) {
    constexpr int64_t kTaskProducts = 192 * 1024;
    return round_up(ceil_div(kTaskProducts, tokens * depth), multiple);
  }

  // Rows begin .. of Z^T, without the bias.
  void down_transposed(const Weights& weights, const Tile<L>& input, int64_t tokens, int64_t begin, int64_t rows,
                       T* zt) const {
    constexpr int64_t kDepth = kSumDepth<E>;
    const int64_t stride = padded<T>(tokens);
    Scratch scratch;
    E* xt = scratch.take<E>(panel_size<E>(units<E>(kDepth), tokens));
    for (int64_t k = 0; k < d_; k += kDepth) {
      const int64_t depth = minimum(kDepth, d_ - k);
      pack_operand(dtype_of<Element<L>>(), elements_of(input.data + units<E>(k)), 1, input.row_stride * kUnit<E>, depth,
                   tokens, xt);
      gemm(rows, tokens, units<E>(depth), weights.down.row(begin) + units<E>(k), weights.down.row_stride, 1, xt,
           zt + begin * stride, stride, k == 0 ? Mode::overwrite : Mode::accumulate);
    }
  }

  // act(Z)^T as panels.
  const E* bottleneck_transposed(int64_t begin, int64_t tokens, const T* zt, Scratch& scratch) const {
    E* ht = scratch.take<E>(panel_size<E>(units<E>(m_), tokens));
    Scratch inner;
    const int64_t z_stride = padded<T>(m_), h_stride = kIsPair<E> ? buffer_stride<L>(units<E>(m_)) : z_stride;
    T* z = inner.take<T>(tokens * z_stride);
    L* h = nullptr;
    if constexpr (kIsPair<E>) {
      h = inner.take<L>(tokens * h_stride);
    } else {
      h = z;
    }
    turn(zt, padded<T>(tokens), m_, tokens, z, z_stride);
    bottleneck_rows(begin, tokens, z, z_stride, h, h_stride);
    pack_operand(dtype_of<Element<L>>(), elements_of(h), 1, h_stride * kUnit<E>, m_, tokens, ht);
    return ht;
  }

  // The columns from .. to of out; from is a multiple of kBlockColumns.
  void up_transposed(const Weights& weights, const E* ht, int64_t begin, int64_t tokens, int64_t from,
                     int64_t to) const {
    const int64_t stride = padded<T>(tokens);
    Scratch scratch;
    T* yt = scratch.take<T>(kBlockColumns * stride);
    T* y = scratch.take<T>(tokens * kBlockColumns);
    for (int64_t j = from; j < to; j += kBlockColumns) {
      const int64_t columns = minimum(kBlockColumns, to - j);
      gemm(columns, tokens, units<E>(m_), weights.up.row(j), weights.up.row_stride, 1, ht, yt, stride, Mode::overwrite);
      turn(yt, stride, columns, tokens, y, kBlockColumns);
      branch_rows(begin, tokens, j, columns, y);
    }
  }

  // The same with the weights where they lie, cut into slices.
  void run_few() {
    const int64_t tokens = p_.tokens, stride = padded<T>(m_);
    const Tile<T> input = input_rows(0, tokens, scratch_);
    T* z = scratch_.take<T>(tokens * stride);
    for_column_slices(tokens, m_, d_, kDotColumns, [&](int64_t begin, int64_t end) {
      dot_rows(tokens, end - begin, d_, input.data, input.row_stride, p_.param_dtype,
               element(p_.param_dtype, p_.down_weight, begin * d_), d_, z + begin, stride, Mode::overwrite);
    });
    bottleneck_rows(0, tokens, z, stride, z, stride);
    for_column_slices(tokens, d_, m_, kBlockColumns, [&](int64_t begin, int64_t end) {
      T y[kFewTokens * kBlockColumns];
      for (int64_t j = begin; j < end; j += kBlockColumns) {
        const int64_t columns = minimum(kBlockColumns, end - j);
        dot_rows(tokens, columns, m_, z, stride, p_.param_dtype, element(p_.param_dtype, p_.up_weight, j * m_), m_, y,
                 kBlockColumns, Mode::overwrite);
        branch_rows(0, tokens, j, columns, y);
      }
    });
  }

  // LayerNorm(x), or x itself, as E: in place where that is possible.
  Tile<L> input_rows(int64_t begin, int64_t rows, Scratch& scratch) const {
    if (norm_weight_ == nullptr) {
      const Tile<L> x = operand_in_place<L>(p_.dtype, p_.x, begin * p_.x_row_stride, p_.x_row_stride, d_);
      if (x.data != nullptr) return x;
    }
    const int64_t stride = buffer_stride<L>(units<E>(d_));
    L* buffer = scratch.take<L>(rows * stride);
    T* row = scratch.take<T>(d_);
    for (int64_t i = 0; i < rows; ++i) {
      const X* x = static_cast<const X*>(p_.x) + (begin + i) * p_.x_row_stride;
      Element<L>* to = elements(buffer + i * stride, d_);
      if (norm_weight_ != nullptr) {
        norm_row(begin + i, x, row, to);
      } else {
        for_columns<T>(d_, [&](auto at, int) LWFT_INLINE { store_at<T>(to, at, load_at<T>(x, at)); });
      }
    }
    return {buffer, stride};
  }

  // to = (x - mean) rstd w + b; row is scratch.
  void norm_row(int64_t token, const X* x, T* row, Element<L>* to) const {
    RowSum<T> total;
    for_columns<T>(d_, [&](auto at, int k) LWFT_INLINE {
      const Vec<T> value = load_at<T>(x, at);
      store_at<T>(row, at, value);
      total.part[k] += value;
    });
    const T mean = total.total() / static_cast<T>(d_), rstd = inverse_deviation(row, d_, mean, p_.eps);
    if (p_.mean != nullptr) {
      static_cast<T*>(p_.mean)[token] = mean;
      static_cast<T*>(p_.rstd)[token] = rstd;
    }
    for_columns<T>(d_, [&](auto at, int) LWFT_INLINE {
      const Vec<T> normalised = (load_at<T>(row, at) - mean) * rstd;
      store_at<T>(to, at, fma(normalised, load_at<T>(norm_weight_, at), load_at<T>(norm_bias_, at)));
    });
  }

  // z += bd, kept for a backward that follows; h = act(z).
  void bottleneck_rows(int64_t begin, int64_t rows, T* z, int64_t z_stride, L* h, int64_t h_stride) const {
    visit_storage(p_.param_dtype, [&](auto storage) {
      const bool keeps = p_.hidden != nullptr;
      auto* hidden = keeps ? static_cast<decltype(storage)*>(p_.hidden) + begin * m_ : nullptr;
      for (int64_t i = 0; i < rows; ++i) {
        T* row = z + i * z_stride;
        for_columns<T>(m_, [&](auto at, int) LWFT_INLINE {
          const Vec<T> value = load_at<T>(row, at) + load_at<T>(down_bias_, at);
          store_at<T>(row, at, value);
          if (keeps) store_at<T>(hidden + i * m_, at, value);
        });
      }
    });
    visit_activation(p_.activation, [&](auto activation) {
      for (int64_t i = 0; i < rows; ++i) {
        const T* row = z + i * z_stride;
        Element<L>* to = elements(h + i * h_stride, m_);
        for_columns<T>(m_, [&](auto at, int) LWFT_INLINE {
          Vec<T> value, slope;
          activate<activation()>(load_at<T>(row, at), value, slope);
          store_at<T>(to, at, value);
        });
      }
    });
  }

  // n columns from j0 on of some tokens: out = residual + dropout(scale * (y + bu)). n <= kBlockColumns, y's row stride.
  void branch_rows(int64_t begin, int64_t rows, int64_t j0, int64_t n, T* y) const {
    const Vec<T> scale = broadcast(static_cast<T>(p_.scale));
    const T* bias = up_bias_ + j0;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = begin + i;
      T* row = y + i * kBlockColumns;
      X* out = static_cast<X*>(p_.out) + token * d_ + j0;
      const X* residual = nullptr;
      if (p_.residual != nullptr) residual = static_cast<const X*>(p_.residual) + token * p_.residual_row_stride + j0;
      if (p_.dropout.active()) {
        for_columns<T>(n, [&](auto at, int) LWFT_INLINE {
          store_at<T>(row, at, (load_at<T>(row, at) + load_at<T>(bias, at)) * scale);
        });
        dropout_row(p_.dropout, token, j0, n, row);
      }
      for_columns<T>(n, [&](auto at, int) LWFT_INLINE {
        Vec<T> value = load_at<T>(row, at);
        if (!p_.dropout.active()) value = (value + load_at<T>(bias, at)) * scale;
        if (residual != nullptr) value += load_at<T>(residual, at);
        write_at<T>(streams_, out, at, value);
      });
    }
  }

  const AdapterForward& p_;
  const int64_t d_, m_;
  Scratch scratch_;
  const T* norm_weight_;
  const T* norm_bias_;
  const T* down_bias_;
  const T* up_bias_;
  const bool streams_;
};

void forward(const AdapterForward& p) { run_by_dtype<Forward>(p); }

}  // namespace

extern const AdapterKernels adapter_kernels;
constexpr AdapterKernels adapter_kernels = {forward, adapter_backward};

}  // namespace lwft::LWFT_ISA

// The adapter's backward on the CPU. With N = LayerNorm(x) = n w + b, n = (x - mean) rstd, H = act(Z), and the gradient
// G = dropout mask * grad_out (the scale is applied to the small results instead):
//
//     dWu = scale G^T H,                 dbu = scale (sum over tokens of G),
//     dZ  = scale (G Wu) * act'(Z),      dbd = sum over tokens of dZ,
//     dWd = dZ^T N,                      dN  = dZ Wd,      dx = LayerNorm's gradient of dN (+ grad_out)
//
// and without ever having dN in memory, from D = dZ^T n, which has only (bottleneck, model_dim) elements,
//
//     dWd = D w + dbd b,   dw = sum over the bottleneck of Wd * D,   db = dbd Wd.
//
// Tokens are taken in chunks, each in two passes. The first, cut into tiles of tokens, leaves dx, and H and dZ of the
// chunk. The second, cut into slices of model_dim, reads grad_out and x again (from the last-level cache, if it holds a
// chunk) and adds to the weights' gradients, each of which has one owner: no atomics, the same bits every time.
#include "adapter/adapter_backward.h"

#include "adapter/adapter_tile.h"
#include "common/cpu/few_tokens.h"

namespace lwft::LWFT_ISA {
namespace {

// What is kept between the passes is bounded by this, whatever the number of tokens: (kChunkTokens, bottleneck) twice.
constexpr int64_t kChunkTokens = 2048;
// Tokens at a time in the second pass: one block of the sum over tokens.
constexpr int64_t kTokenBlock = 256;

// Both products are with a weight as it lies (combine_rows), which pays up to twice as many tokens as in forward.
constexpr int64_t kFewTokensBackward = 2 * kFewTokens;

template <class E, class X>
class Backward {
  using T = SumOf<E>;
  using L = LeftOf<E>;

 public:
  explicit Backward(const AdapterBackward& p)
      : p_(p),
        d_(p.model_dim),
        m_(p.bottleneck),
        few_(kPanelsAreRows<E> && p.tokens <= kFewTokensBackward),
        normed_(p.norm_weight != nullptr),
        up_wanted_(p.dup_weight != nullptr || p.dup_bias != nullptr),
        sums_wanted_(p.ddown_weight != nullptr || p.dnorm_weight != nullptr),
        down_wanted_(sums_wanted_ || p.dnorm_bias != nullptr),
        dz_wanted_(p.dx != nullptr || down_wanted_ || p.ddown_bias != nullptr),
        row_stride_(buffer_stride<T>(m_)),
        norm_weight_(normed_ ? parameter_row(p.param_dtype, p.norm_weight, d_, T{1}, scratch_) : nullptr),
        norm_bias_(normed_ ? parameter_row(p.param_dtype, p.norm_bias, d_, T{0}, scratch_) : nullptr),
        shared_(p.tokens > kChunkTokens || shares_packs(token_tiles<E>(p.tokens, d_))),
        up_(p.param_dtype, p.up_weight, m_, 1, few_ || !dz_wanted_ ? 0 : d_, m_, shared_, scratch_),
        down_(p.param_dtype, p.down_weight, d_, 1, few_ || p.dx == nullptr ? 0 : m_, d_, shared_, scratch_),
        streams_(p.dx != nullptr && may_stream<T>(p.dtype, p.dx, p.tokens, d_)) {}

  void run() {
    if constexpr (kPanelsAreRows<E>) {
      if (few_ && !normed_ && p_.tokens > 0) return run_few();
    }
    const int64_t chunks = ceil_div(p_.tokens, kChunkTokens);
    const int64_t chunk_tokens = chunks > 1 ? round_up(ceil_div(p_.tokens, chunks), kTokenBlock) : p_.tokens;
    tiles_ = token_tiles<E>(chunk_tokens, d_);
    if (few_) tiles_ = tiles_of(p_.tokens, kFewTokensBackward);
    chunk_room_ = chunk_tokens;
    dz_ = scratch_.take<E>(sums_wanted_ ? kept_size(chunk_room_) : 0);
    h_ = scratch_.take<E>(up_wanted_ ? kept_size(chunk_room_) : 0);
    group_sums_ = scratch_.take<T>(dz_wanted_ ? (groups(chunk_tokens) + 1) * row_stride_ : 0);
    ddown_bias_ = scratch_.take<T>(row_stride_);
    for (int64_t k = 0; k < m_; ++k) ddown_bias_[k] = T{0};
    dup_bias_ = scratch_.take<T>(up_wanted_ ? padded<T>(d_) : 0);
    if (chunks > 1) {
      dup_ = scratch_.take<T>(up_wanted_ ? slices() * kBlockColumns * row_stride_ : 0);
      ddown_ = scratch_.take<T>(sums_wanted_ ? slices() * kBlockColumns * m_ : 0);
    }
    pack(up_, down_);

    // at least once: without tokens the gradients are zeros
    chunk_ = 0;
    do {
      chunk_size_ = minimum(chunk_tokens, p_.tokens - chunk_);
      first_ = chunk_ == 0;
      last_ = chunk_ + chunk_size_ == p_.tokens;
      tiles_ = tiles_of(chunk_size_, tiles_.rows);
      token_pass();
      weight_pass();
      chunk_ += chunk_size_;
    } while (!last_);
    if (p_.ddown_bias != nullptr) store_row(p_.param_dtype, ddown_bias_, m_, p_.ddown_bias, 0);
  }

 private:
  // ---- a few tokens, no LayerNorm: the weights and their gradients are all the memory there is ----

  // Rows of Wu, or columns of Wd, for one task: about as many elements as make up for waking a thread.
  int64_t few_columns() const {
    constexpr int64_t kTaskElements = 64 * 1024, kMultiple = kCombineColumns<T>, kMost = 1024;
    return minimum(kMost, round_up(ceil_div(kTaskElements, m_), kMultiple));
  }

  void run_few() {
    const int64_t tokens = p_.tokens, width = few_columns(), tasks = ceil_div(d_, width);
    const int64_t size = tokens * row_stride_;
    const Tile<T> g = gradient_rows(0, tokens, scratch_);
    T* const h = scratch_.take<T>(up_wanted_ ? size : 0);
    T* const slopes = scratch_.take<T>(size);  // with the scale
    for (int64_t i = 0; i < size; ++i) slopes[i] = T{1};
    activation_rows(0, tokens, h, slopes);
    for (int64_t i = 0; up_wanted_ && i < size; ++i) h[i] *= static_cast<T>(p_.scale);
    // The products of every task, to be added in the order of the tasks, whoever has done them.
    T* const dz = scratch_.take<T>(dz_wanted_ ? tasks * size : 0);
    parallel_for(tasks, [&](int64_t task) {
      const int64_t j = task * width, n = minimum(width, d_ - j);
      const Tile<T> columns{g.data + j, g.row_stride};
      if (dz_wanted_) {
        combine_rows(tokens, m_, n, columns.data, columns.row_stride, p_.param_dtype,
                     element(p_.param_dtype, p_.up_weight, j * m_), m_, dz + task * size, row_stride_, Mode::overwrite);
      }
      if (p_.dup_weight != nullptr) {
        tall_gradient<T>(tokens, n, m_, columns, {h, row_stride_}, p_.param_dtype, p_.dup_weight, j * m_);
      }
      if (p_.dup_bias != nullptr) {
        bias_gradient(tokens, n, columns, static_cast<T>(p_.scale), p_.param_dtype, p_.dup_bias, j);
      }
    });
    if (!dz_wanted_) return;
    for (int64_t i = 0; i < tokens; ++i) {
      T* const row = dz + i * row_stride_;
      for_columns<T>(m_, [&](auto at, int) LWFT_INLINE {
        Vec<T> sum = load_at<T>(row, at);
        for (int64_t task = 1; task < tasks; ++task) sum += load_at<T>(row + task * size, at);
        store_at<T>(row, at, sum * load_at<T>(slopes + i * row_stride_, at));
      });
    }
    if (p_.ddown_bias != nullptr) {
      bias_gradient<T>(tokens, m_, {dz, row_stride_}, T{1}, p_.param_dtype, p_.ddown_bias, 0);
    }
    if (p_.dx == nullptr && p_.ddown_weight == nullptr) return;
    parallel_for(tasks, [&](int64_t task) {
      const int64_t j = task * width, n = minimum(width, d_ - j);
      if (p_.ddown_weight != nullptr) {
        wide_gradient<T>(tokens, m_, n, {dz, row_stride_}, p_.dtype, element(p_.dtype, p_.x, j), p_.x_row_stride,
                         p_.param_dtype, p_.ddown_weight, j, d_);
      }
      if (p_.dx != nullptr) input_gradient_columns(0, tokens, Tile<T>{dz, row_stride_}, j, j + n);
    });
  }

  // ---- first pass: tiles of tokens ----

  void token_pass() {
    if (few_) {
      if (p_.tokens > 0) token_tile(0);  // its products are cut into slices for the threads
    } else {
      parallel_for(tiles_.count, [&](int64_t tile) { token_tile(tile); });
    }
    for (int64_t group = 0; dz_wanted_ && group < groups(chunk_size_); ++group) {
      for (int64_t k = 0; k < m_; ++k) ddown_bias_[k] += group_sums_[group * row_stride_ + k];
    }
  }

  void token_tile(int64_t tile) {
    if (!up_wanted_ && !dz_wanted_) return;
    const int64_t begin = tiles_.begin(tile), rows = tiles_.size(tile);
    Scratch scratch;
    T* h = scratch.take<T>(up_wanted_ ? rows * row_stride_ : 0);
    T* dz = scratch.take<T>(dz_wanted_ ? rows * row_stride_ : 0);
    if (dz_wanted_) times_up_weight(begin, rows, dz);
    activation_rows(begin, rows, h, dz);
    if (up_wanted_) keep_rows(h, begin, rows, h_);
    if (sums_wanted_) keep_rows(dz, begin, rows, dz_);
    for (int64_t i = 0; dz_wanted_ && i < rows; i += kSummedTokens) {
      column_sums(dz + i * row_stride_, minimum(kSummedTokens, rows - i), row_stride_, m_,
                  group_sums_ + (begin + i) / kSummedTokens * row_stride_);
    }
    if (p_.dx == nullptr) return;
    const auto operand = left_of_several<E>(operand_rows(dz, rows, scratch), rows, m_, scratch);
    if (normed_) {
      input_gradient_with_norm(begin, rows, operand);
    } else {
      input_gradient_columns(begin, rows, operand, 0, d_);
    }
    if (streams_) finish_streaming();
  }

  // dZ is summed by groups of so many tokens, however the tiles are cut.
  static constexpr int64_t kSummedTokens = 16;
  static_assert(kTileMultiple<E> % kSummedTokens == 0);
  static int64_t groups(int64_t tokens) { return ceil_div(tokens, kSummedTokens); }

  const X* input(int64_t token) const { return static_cast<const X*>(p_.x) + token * p_.x_row_stride; }
  const X* grad_out(int64_t token) const { return static_cast<const X*>(p_.grad_out) + token * p_.grad_out_row_stride; }

  // dZ as a left-hand side.
  Tile<L> operand_rows(const T* dz, int64_t rows, Scratch& scratch) const {
    if constexpr (kIsPair<E>) {
      const int64_t stride = buffer_stride<L>(units<E>(m_));
      L* buffer = scratch.take<L>(rows * stride);
      for (int64_t i = 0; i < rows; ++i) store_operand(dz + i * row_stride_, m_, buffer + i * stride);
      return {buffer, stride};
    } else {
      return {dz, row_stride_};
    }
  }

  // H and dZ of the chunk, whose transposes the second pass multiplies: in panels, whose k is the token, or split.
  static constexpr bool kSplits = std::is_same_v<E, FloatParts>;
  int64_t kept_size(int64_t tokens) const {
    return kSplits ? split_size(m_, tokens) : panel_size<E>(units<E>(tokens), m_);
  }

  // Where panels have the row of `token` and the columns from `column` on. `column` is a multiple of kPanelColumns<E>, `token`
  // of kUnit<E>.
  E* kept(E* panels, int64_t token, int64_t column) const {
    const int64_t width = padded<E>(minimum(kPanelColumns<E>, m_ - column));
    return panels + column * units<E>(chunk_room_) + token / kUnit<E> * width;
  }

  void keep_rows(const T* rows, int64_t begin, int64_t count, E* to) const {
    if constexpr (kSplits) {
      split_left(m_, count, rows, 1, row_stride_, to, begin, chunk_room_);
    } else {
      for (int64_t k = 0; k < m_; k += kPanelColumns<E>) {
        pack_operand(dtype_of<T>(), rows + k, row_stride_, 1, count, minimum(kPanelColumns<E>, m_ - k),
                     kept(to, begin, k));
      }
    }
  }

  // sums (bottleneck, columns) (+)= what is kept of the tokens t .. t + tokens, transposed, times the panels of a matrix.
  void multiply_kept(E* from, int64_t t, int64_t tokens, int64_t columns, const E* panels, T* sums) const {
    const Mode mode = first_ && t == 0 ? Mode::overwrite : Mode::accumulate;
    if constexpr (kSplits) {
      gemm_split(m_, columns, tokens, from, t, chunk_room_, panels, sums, kBlockColumns, mode);
    } else {
      for (int64_t k = 0; k < m_; k += kPanelColumns<E>) {
        const int64_t rows = minimum(kPanelColumns<E>, m_ - k);
        gemm(rows, columns, units<E>(tokens), kept(from, t, k), 1, padded<E>(rows), panels, sums + k * kBlockColumns,
             kBlockColumns, mode);
      }
    }
  }

  // G Wu
  void times_up_weight(int64_t begin, int64_t rows, T* product) const {
    Scratch scratch;
    const Tile<L> g = gradient_rows(begin, rows, scratch);
    if constexpr (kPanelsAreRows<E>) {
      if (few_) {
        for_column_slices(rows, m_, d_, kCombineColumns<T>, [&](int64_t from, int64_t to) {
          combine_rows(rows, to - from, d_, g.data, g.row_stride, p_.param_dtype,
                       element(p_.param_dtype, p_.up_weight, from), m_, product + from, row_stride_, Mode::overwrite);
        });
        return;
      }
    }
    up_.multiply(rows, g, 0, m_, product, row_stride_);
  }

  // Rows of G as E: grad_out where it lies, if that is the same.
  Tile<L> gradient_rows(int64_t begin, int64_t rows, Scratch& scratch) const {
    const int64_t token = chunk_ + begin, grad_stride = p_.grad_out_row_stride;
    if (!p_.dropout.active()) {
      const Tile<L> g = operand_in_place<L>(p_.dtype, p_.grad_out, token * grad_stride, grad_stride, d_);
      if (g.data != nullptr) return g;
    }
    const int64_t stride = buffer_stride<L>(units<E>(d_));
    L* buffer = scratch.take<L>(rows * stride);
    T* row = scratch.take<T>(d_);
    for (int64_t i = 0; i < rows; ++i) {
      if constexpr (!kIsPair<E>) row = buffer + i * stride;
      gradient_row(token + i, 0, d_, row);
      store_operand(row, d_, buffer + i * stride);
    }
    return {buffer, stride};
  }

  void gradient_row(int64_t token, int64_t j, int64_t n, T* row) const {
    const X* from = grad_out(token) + j;
    for_columns<T>(n, [&](auto at, int) LWFT_INLINE { store_at<T>(row, at, load_at<T>(from, at)); });
    if (p_.dropout.active()) dropout_row(p_.dropout, token, j, n, row);
  }

  // H = act(Z) and dZ = scale (G Wu) * act'(Z); dz holds the product.
  void activation_rows(int64_t begin, int64_t rows, T* h, T* dz) const {
    Scratch scratch;
    T* converted = scratch.take<T>(rows * m_);
    const Tile<T> hidden = view_tile(p_.param_dtype, p_.hidden, (chunk_ + begin) * m_, m_, rows, m_, converted);
    const Vec<T> scale = broadcast(static_cast<T>(p_.scale));
    visit_activation(p_.activation, [&](auto activation) {
      for (int64_t i = 0; i < rows; ++i) {
        const T* z = hidden.row(i);
        T* h_row = h + i * row_stride_;
        T* dz_row = dz + i * row_stride_;
        for_columns<T>(m_, [&](auto at, int) LWFT_INLINE {
          Vec<T> value, slope;
          activate<activation()>(load_at<T>(z, at), value, slope);
          if (up_wanted_) store_at<T>(h_row, at, value);
          if (dz_wanted_) store_at<T>(dz_row, at, load_at<T>(dz_row, at) * slope * scale);
        });
      }
    });
  }

  // dx = dZ Wd (+ grad_out), a block of columns at a time.
  template <class Left>
  void input_gradient_columns(int64_t begin, int64_t rows, const Left& dz, int64_t from, int64_t to) const {
    Scratch scratch;
    T* block = scratch.take<T>(rows * kBlockColumns);
    for (int64_t j = from; j < to; j += kBlockColumns) {
      const int64_t columns = minimum(kBlockColumns, to - j);
      times_down_weight(dz, rows, j, columns, block, kBlockColumns);
      for (int64_t i = 0; i < rows; ++i) {
        const T* row = block + i * kBlockColumns;
        store_input_gradient(chunk_ + begin + i, j, columns, [&](auto at) LWFT_INLINE { return load_at<T>(row, at); });
      }
    }
  }

  // With g = dN w: dx = rstd (g - mean(g) - n mean(g n)) (+ grad_out).
  template <class Left>
  void input_gradient_with_norm(int64_t begin, int64_t rows, const Left& dz) const {
    Scratch scratch;
    const int64_t stride = buffer_stride<T>(d_);
    T* dn = scratch.take<T>(rows * stride);
    if (few_) {
      for_column_slices(rows, d_, m_, kCombineColumns<T>, [&](int64_t from, int64_t to) {
        times_down_weight(dz, rows, from, to - from, dn + from, stride);
      });
    } else {
      times_down_weight(dz, rows, 0, d_, dn, stride);
    }
    const T width = static_cast<T>(d_);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = chunk_ + begin + i;
      T* g = dn + i * stride;
      RowSum<T> sum_g, sum_gn;
      for_normalised(token, 0, d_, [&](auto at, int k, Vec<T> n) LWFT_INLINE {
        const Vec<T> value = load_at<T>(g, at) * load_at<T>(norm_weight_, at);  // zero past the end
        store_at<T>(g, at, value);
        sum_g.part[k] += value;
        sum_gn.part[k] = fma(value, n, sum_gn.part[k]);
      });
      const T mean_g = sum_g.total() / width, mean_gn = sum_gn.total() / width;
      const T mean = static_cast<const T*>(p_.mean)[token], rstd = static_cast<const T*>(p_.rstd)[token];
      const X* x = input(token);
      store_input_gradient(token, 0, d_, [&](auto at) LWFT_INLINE {
        const Vec<T> n = (load_at<T>(x, at) - mean) * rstd;
        return (load_at<T>(g, at) - mean_g - n * mean_gn) * rstd;
      });
    }
  }

  // The columns from j on of dZ Wd.
  template <class Left>
  void times_down_weight(const Left& dz, int64_t rows, int64_t j, int64_t columns, T* result, int64_t stride) const {
    if constexpr (kPanelsAreRows<E>) {
      if (few_) {
        combine_rows(rows, columns, m_, dz.data, dz.row_stride, p_.param_dtype,
                     element(p_.param_dtype, p_.down_weight, j), d_, result, stride, Mode::overwrite);
        return;
      }
    }
    down_.multiply(rows, dz, j, columns, result, stride);
  }

  // body(at, k, n) with n = (x - mean) rstd, for the columns j0 .. j0 + count.
  template <class Body>
  LWFT_INLINE inline void for_normalised(int64_t token, int64_t j0, int64_t count, const Body& body) const {
    const X* x = input(token) + j0;
    const T mean = static_cast<const T*>(p_.mean)[token], rstd = static_cast<const T*>(p_.rstd)[token];
    for_columns<T>(count, [&](auto at, int k) LWFT_INLINE { body(at, k, (load_at<T>(x, at) - mean) * rstd); });
  }

  // dx = branch(at), plus grad_out where the residual is x; columns j0 .. j0 + count.
  template <class Branch>
  LWFT_INLINE inline void store_input_gradient(int64_t token, int64_t j0, int64_t count, const Branch& branch) const {
    X* dx = static_cast<X*>(p_.dx) + token * d_ + j0;
    const X* direct = grad_out(token) + j0;
    for_columns<T>(count, [&](auto at, int) LWFT_INLINE {
      Vec<T> value = branch(at);
      if (p_.residual_is_x) value += load_at<T>(direct, at);
      write_at<T>(streams_, dx, at, value);
    });
  }

  // ---- second pass: slices of model_dim ----

  int64_t slices() const { return ceil_div(d_, kBlockColumns); }

  void weight_pass() {
    if (!up_wanted_ && !down_wanted_) return;
    const int64_t kinds = up_wanted_ && down_wanted_ ? 2 : 1;
    parallel_for(kinds * slices(), [&](int64_t task) {
      const int64_t j = task / kinds * kBlockColumns, columns = minimum(kBlockColumns, d_ - j);
      Scratch scratch;
      if (up_wanted_ && task % kinds == 0) {
        T* sums = dup_ != nullptr ? dup_ + j * row_stride_ : scratch.take<T>(kBlockColumns * row_stride_);
        add_up_slice(j, columns, sums);
        if (last_) store_up_slice(j, columns, sums);
      } else {
        T* sums = ddown_ != nullptr ? ddown_ + j * m_ : scratch.take<T>(sums_wanted_ ? kBlockColumns * m_ : 0);
        if (sums_wanted_) add_down_slice(j, columns, sums);
        if (last_) store_down_slice(j, columns, sums);
      }
    });
  }

  // Rows j .. of G^T H into dup_sums, and the sums of G's columns. Of numbers in parts its transpose: H is split already, and
  // panels are packed faster than a transposed G is split.
  void add_up_slice(int64_t j, int64_t columns, T* dup_sums) const {
    Scratch scratch;
    E* g = scratch.take<E>(panel_size<E>(units<E>(kTokenBlock), kBlockColumns));
    T* dropped = scratch.take<T>(p_.dropout.active() ? kTokenBlock * kBlockColumns : 0);
    T* sums = scratch.take<T>(kBlockColumns);
    for (int64_t i = 0; first_ && i < columns; ++i) dup_bias_[j + i] = T{0};
    for (int64_t t = 0; t < chunk_size_ || (first_ && t == 0); t += kTokenBlock) {
      const int64_t tokens = minimum(kTokenBlock, chunk_size_ - t), depth = units<E>(tokens), token = chunk_ + t;
      if (p_.dropout.active()) {
        for (int64_t i = 0; i < tokens; ++i) gradient_row(token + i, j, columns, dropped + i * kBlockColumns);
        pack_operand(dtype_of<T>(), dropped, kBlockColumns, 1, tokens, columns, g);
      } else {
        pack_operand(p_.dtype, element(p_.dtype, p_.grad_out, token * p_.grad_out_row_stride + j),
                     p_.grad_out_row_stride, 1, tokens, columns, g);
      }
      if constexpr (kSplits) {
        if (p_.dropout.active()) {
          column_sums(dropped, tokens, kBlockColumns, columns, sums);
        } else {
          column_sums(grad_out(token) + j, tokens, p_.grad_out_row_stride, columns, sums);
        }
      } else {
        panel_sums(g, depth, columns, sums);
      }
      for (int64_t i = 0; i < columns; ++i) dup_bias_[j + i] += sums[i];
      if constexpr (kSplits) {
        multiply_kept(h_, t, tokens, columns, g, dup_sums);
      } else {
        const Mode mode = first_ && t == 0 ? Mode::overwrite : Mode::accumulate;
        for (int64_t i = 0; i < columns; i += kPanelColumns<E>) {
          const int64_t rows = minimum(kPanelColumns<E>, columns - i);
          for (int64_t k = 0; k < m_; k += kPanelColumns<E>) {
            gemm(rows, minimum(kPanelColumns<E>, m_ - k), depth, g + i * depth, 1, padded<E>(rows), kept(h_, t, k),
                 dup_sums + i * row_stride_ + k, row_stride_, mode);
          }
        }
      }
    }
  }

  // The sums over k of every column of the panels.
  static void panel_sums(const E* panels, int64_t depth, int64_t columns, T* sums) {
    if constexpr (kIsPair<E>) {
      constexpr E kOnes = {0x3F80, 0x3F80};
      gemm(1, columns, depth, &kOnes, 0, 0, panels, sums, kBlockColumns, Mode::overwrite);
    } else {
      for (int64_t i = 0; i < columns; i += kPanelColumns<E>) {
        const int64_t count = minimum(kPanelColumns<E>, columns - i);
        column_sums(panels + i * depth, depth, padded<E>(count), count, sums + i);
      }
    }
  }

  void store_up_slice(int64_t j, int64_t columns, T* dup_sums) const {
    Scratch scratch;
    if constexpr (kSplits) {
      T* const transposed = dup_sums;
      dup_sums = scratch.take<T>(kBlockColumns * row_stride_);
      turn(transposed, kBlockColumns, m_, columns, dup_sums, row_stride_);
    }
    const Vec<T> scale = broadcast(static_cast<T>(p_.scale));
    for (int64_t i = 0; p_.dup_weight != nullptr && i < columns; ++i) {
      const int64_t at = (j + i) * m_;
      T* row = dup_sums + i * row_stride_;
      T* to = p_.param_dtype == dtype_of<T>() ? static_cast<T*>(p_.dup_weight) + at : row;
      for (int64_t k = 0; k < m_; k += kLanes<T>) store_columns(to, k, m_, load(row + k) * scale);
      if (to == row) store_row(p_.param_dtype, row, m_, p_.dup_weight, at);
    }
    if (p_.dup_bias != nullptr) {
      for (int64_t i = j; i < j + columns; ++i) dup_bias_[i] *= static_cast<T>(p_.scale);
      store_row(p_.param_dtype, dup_bias_ + j, columns, p_.dup_bias, j);
    }
  }

  // Columns j .. of D = dZ^T n, or of dZ^T x where there is no LayerNorm.
  void add_down_slice(int64_t j, int64_t columns, T* sums) const {
    Scratch scratch;
    E* n = scratch.take<E>(panel_size<E>(units<E>(kTokenBlock), kBlockColumns));
    T* normalised = scratch.take<T>(normed_ ? kTokenBlock * kBlockColumns : 0);
    for (int64_t t = 0; t < chunk_size_ || (first_ && t == 0); t += kTokenBlock) {
      const int64_t tokens = minimum(kTokenBlock, chunk_size_ - t), token = chunk_ + t;
      if (normed_) {
        for (int64_t i = 0; i < tokens; ++i) {
          T* row = normalised + i * kBlockColumns;
          for_normalised(token + i, j, columns,
                         [&](auto at, int, Vec<T> value) LWFT_INLINE { store_at<T>(row, at, value); });
        }
        pack_operand(dtype_of<T>(), normalised, kBlockColumns, 1, tokens, columns, n);
      } else {
        pack_operand(p_.dtype, element(p_.dtype, p_.x, token * p_.x_row_stride + j), p_.x_row_stride, 1, tokens,
                     columns, n);
      }
      multiply_kept(dz_, t, tokens, columns, n, sums);
    }
  }

  void store_down_slice(int64_t j, int64_t columns, T* sums) const {
    Scratch scratch;
    T* row = scratch.take<T>(kBlockColumns);
    if (p_.dnorm_bias != nullptr) {
      combine_rows(1, columns, m_, ddown_bias_, row_stride_, p_.param_dtype, element(p_.param_dtype, p_.down_weight, j),
                   d_, row, kBlockColumns, Mode::overwrite);
      store_row(p_.param_dtype, row, columns, p_.dnorm_bias, j);
    }
    if (p_.dnorm_weight != nullptr) {
      T* total = scratch.take<T>(kBlockColumns);
      for (int64_t i = 0; i < columns; ++i) total[i] = T{0};
      for (int64_t k = 0; k < m_; ++k) {
        const T* weight = view_row(p_.param_dtype, p_.down_weight, k * d_ + j, columns, row);
        for (int64_t i = 0; i < columns; ++i) total[i] += weight[i] * sums[k * kBlockColumns + i];
      }
      store_row(p_.param_dtype, total, columns, p_.dnorm_weight, j);
    }
    if (p_.ddown_weight != nullptr) {
      for (int64_t k = 0; k < m_; ++k) {
        T* gradient = sums + k * kBlockColumns;
        if (normed_) {
          const T bias_sum = ddown_bias_[k];
          for (int64_t i = 0; i < columns; ++i) {
            gradient[i] = gradient[i] * norm_weight_[j + i] + bias_sum * norm_bias_[j + i];
          }
        }
        store_row(p_.param_dtype, gradient, columns, p_.ddown_weight, k * d_ + j);
      }
    }
  }

  // The sums of `columns` columns of a few hundred rows at most: eight interleaved sums, for speed and for accuracy.
  template <class Storage>
  static void column_sums(const Storage* rows, int64_t count, int64_t stride, int64_t columns, T* sums) {
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const auto load_at = [&](int64_t i) {
        const Storage* from = rows + i * stride + j;
        return j + kLanes<T> <= columns ? load_as<T>(from) : load_first_as<T>(from, columns - j);
      };
      Vec<T> parts[8] = {};
      int64_t i = 0;
      for (; i + 8 <= count; i += 8) {
#pragma GCC unroll 8
        for (int part = 0; part < 8; ++part) parts[part] += load_at(i + part);
      }
      for (; i < count; ++i) parts[i % 8] += load_at(i);
      store_columns(sums, j, columns,
                    ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7])));
    }
  }

  const AdapterBackward& p_;
  const int64_t d_, m_;
  const bool few_, normed_;
  const bool up_wanted_, sums_wanted_, down_wanted_, dz_wanted_;
  const int64_t row_stride_;  // of rows of `bottleneck` T
  Scratch scratch_;
  const T* norm_weight_;
  const T* norm_bias_;
  const bool shared_;  // the packs
  const PackedWeight<E> up_, down_;
  const bool streams_;

  // one chunk
  int64_t chunk_ = 0, chunk_size_ = 0;  // its first token, its tokens
  bool first_ = true, last_ = true;
  Tiles tiles_{};
  int64_t chunk_room_ = 0;   // tokens that there is room for
  E* dz_ = nullptr;          // kept: (chunk, bottleneck)
  E* h_ = nullptr;           // likewise
  T* group_sums_ = nullptr;  // (groups, bottleneck): sums of dZ over a group

  // all of them
  T* ddown_bias_ = nullptr;  // (bottleneck)
  T* dup_bias_ = nullptr;    // (model_dim), before the scale
  T* dup_ = nullptr;         // (model_dim, bottleneck), before the scale; null if one chunk is all
  T* ddown_ = nullptr;       // [slice of model_dim][bottleneck][kBlockColumns]: D; likewise
};

}  // namespace

void adapter_backward(const AdapterBackward& p) { run_by_dtype<Backward>(p); }

}  // namespace lwft::LWFT_ISA

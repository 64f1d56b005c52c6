// The interface of the kernels on CUDA devices.

#pragma once

#include "../dispersion.h"

namespace minidisp::cuda {

struct Workspace {  // at most 112 MB in total
  int64_t tile_weights = 64 << 20, tile_tokens = 48 << 20;  // bytes, by tiles: W, x
  int64_t weights = 16 << 20, tokens = 36 << 20;            // bytes, by blocks: W, U
  int64_t longest_row = 8192;                               // of W, by blocks
  int64_t sequences = 65535;                                // per batch: guaranteed to work in cuBLAS
};

// Numbers in the state of the tokens that forward leaves for backward.
int64_t state_size(const TokenVectors& z);

// The losses of the sequences, (B); and for backward, if need_grad, the product W U or W U', (B, T, C), and the state.
// exact: without tensor cores.
void dispersion(const TokenVectors& z, const Options& options, bool need_grad, bool exact, const Workspace& space,
                float* product, float* state, double* losses);

// The gradient in the type of z, contiguous, times upstream, a number on the device.
void dispersion_backward(const TokenVectors& z, Variant variant, const float* upstream, const float* product,
                         float* state, void* grad);

struct Logits {  // (rows, V), rows at any stride, in elements
  Type type;
  void* data;
  int64_t rows, V, stride;
};

// losses (rows); if need_grad, the gradient of their sum overwrites the logits.
void cross_entropy(const Logits& logits, const int64_t* targets, int64_t ignored, bool need_grad, float* losses);

}  // namespace minidisp::cuda

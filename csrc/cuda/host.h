// What the launchers need from their host: the stream, errors, memory and matrix products. They do not depend on torch;
// bindings.cpp implements these functions with torch.

#pragma once

#include <cstdint>

#include "../type.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace minidisp::cuda {

// The current stream of the current device.
CUstream_st* current_stream();

// Raises torch's error for a cudaError_t, unless it is cudaSuccess.
void check(int error);
[[noreturn]] void fail(const char* message);

// Uninitialised memory on the current device for the duration of a call, from torch's allocator, so that running out of
// it raises torch's error.
class Memory {
 public:
  explicit Memory(int64_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  void* data() const { return data_; }

 private:
  void *owner_, *data_;
};

template <class T>
class Array : Memory {
 public:
  explicit Array(int64_t size) : Memory(size * static_cast<int64_t>(sizeof(T))) {}
  T* data() const { return static_cast<T*>(Memory::data()); }
};

struct Matrices {  // (n, rows, columns), at any strides, in elements
  Type type;
  void* data;
  int64_t size[3], stride[3];

  // As those of tensors.
  Matrices narrow(int dim, int64_t start, int64_t length) const {
    Matrices part = *this;
    part.data = static_cast<char*>(data) + start * stride[dim] * (type == Type::float32 ? 4 : 2);
    part.size[dim] = length;
    return part;
  }
  Matrices mT() const { return {type, data, {size[0], size[2], size[1]}, {stride[0], stride[2], stride[1]}}; }
};

// out = a b, or out += a b; out may be float32 if a and b have 16 bits.
void multiply(const Matrices& out, const Matrices& a, const Matrices& b, bool add);

}  // namespace minidisp::cuda

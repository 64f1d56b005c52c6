// The types of numbers that the kernels take.

#pragma once

namespace minidisp {

enum class Type { float32, bfloat16, float16 };

}  // namespace minidisp

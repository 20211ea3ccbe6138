// The instructions that CUDA C++ has no word for: asynchronous copies, and matrix products on the
// tensor cores of sm_80 and later. Fragments are laid out as the PTX ISA draws them (9.7.14,
// "Matrix multiply-accumulate"): with g = lane / 4 and t = lane % 4,
//
//   A, 16 x 16 of 16 bits: a[0] row g, columns 2t and 2t + 1; a[1] row g + 8; a[2], a[3] columns +
//   8 B, 16 x 8 of 16 bits:  b[0] rows 2t and 2t + 1, column g; b[1] rows + 8 A, 16 x 8 of tf32:
//   a[0] row g, column t; a[1] row g + 8; a[2], a[3] column + 4 B, 8 x 8 of tf32:      b[0] row t,
//   column g; b[1] row + 4 C, 16 x 8 of float:    c[0], c[1] row g, columns 2t and 2t + 1; c[2],
//   c[3] row g + 8
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fastprune {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies Bytes (4, 8 or 16, to which both addresses are aligned) to shared memory while the thread
// goes on: `valid` bytes from global memory, zeros after them. With 0 valid bytes nothing is read.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if constexpr (Bytes == 16) {
    // Past the first-level cache, which each thread block would fill with what it reads once.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(Bytes), "r"(valid)
                 : "memory");
  }
}

// The same of 16 bytes, to an address of shared memory, and only where `wanted`: by a predicate
// rather than a branch, which neighbouring copies could not be moved across. Where `valid` is 16 or
// 0, and the compiler sees it, a copy takes one instruction, else six. (%p0: nvcc's own predicates
// begin with %p1.)
__device__ __forceinline__ void copy_async_where(bool wanted, uint32_t shared, const void* global,
                                                 int valid) {
  asm volatile(
      "{ .reg .pred %%p0;\n"
      "  setp.ne.u32 %%p0, %3, 0;\n"
      "  @%%p0 cp.async.cg.shared.global [%0], [%1], 16, %2; }" ::"r"(shared),
      "l"(global), "r"(valid), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

// Ends a group of copies; waits are counted in groups.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for this thread's copies but those of the `Pending` latest groups. Other threads see them
// after the next barrier.
template <int Pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + r names the 16 bytes of row r of matrix i, and
// gets of each matrix the two elements 2t and 2t + 1 of row g.
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], const void* row) {
  load_matrices(matrices, shared_address(row));
}

// The same of the transposed matrices: rows 2t and 2t + 1 of column g.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&matrices)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  load_matrices_transposed(matrices, shared_address(row));
}

// An index of global memory, or `otherwise` where it is not `wanted`, without a branch.
__device__ __forceinline__ int32_t load_where(bool wanted, const int32_t* global,
                                              int32_t otherwise) {
  asm volatile(
      "{ .reg .pred %%p0;\n"
      "  setp.ne.u32 %%p0, %2, 0;\n"
      "  @%%p0 ld.global.nc.b32 %0, [%1]; }"
      : "+r"(otherwise)
      : "l"(global), "r"(static_cast<uint32_t>(wanted)));
  return otherwise;
}

// Two neighbouring words of shared memory.
__device__ __forceinline__ void load_pair(uint32_t& first, uint32_t& second, uint32_t address) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
               : "=r"(first), "=r"(second)
               : "r"(address)
               : "memory");
}

// Four words to shared memory, at a multiple of 16 bytes.
__device__ __forceinline__ void store_four(uint32_t address, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// The nearest value of tf32, ties away from zero, as the bits of a float.
__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}

// c += a @ b. T is __half or __nv_bfloat16, with 16 columns of a; or float, for tf32 with 8.
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 4) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace fastprune

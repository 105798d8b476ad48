// The bodies on AVX512; setup.py gives this file, and no other, its flags.
#include <immintrin.h>

#define KF_VECTOR_BYTES 64
#define KF_TABLE avx512_table
#include "isa_body.inl"

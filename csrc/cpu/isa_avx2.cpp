// The bodies on AVX2; setup.py gives this file, and no other, its flags.
#include <immintrin.h>

#define KF_VECTOR_BYTES 32
#define KF_TABLE avx2_table
#include "isa_body.inl"

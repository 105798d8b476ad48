// The bodies on NEON, which every 64-bit ARM processor has; setup.py compiles this file there, and nowhere else.
#include <arm_neon.h>

#define KF_VECTOR_BYTES 16
#define KF_NEON
#define KF_TABLE neon_table
#include "isa_body.inl"

// The bodies on the compiler's default instruction set.
#define KF_VECTOR_BYTES 16
#define KF_TABLE generic_table
#include "isa_body.inl"

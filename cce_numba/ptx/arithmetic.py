"""Single instructions on float32 for which Python has no name, or not with these properties."""

from __future__ import annotations

from cce_numba.ptx.instruction import F32, I32, U32, instruction

exp2 = instruction(
    "ex2.approx.ftz.f32 $0, $1;",
    (F32,),
    F32,
    ordered=False,
    doc="2^x within 2^-22, relative; subnormal results are 0. ISA 9.7.3, ex2.",
)
log2 = instruction(
    "lg2.approx.ftz.f32 $0, $1;",
    (F32,),
    F32,
    ordered=False,
    doc="Base-2 logarithm within 2^-22. ISA 9.7.3, lg2.",
)
maximum = instruction(
    "max.f32 $0, $1, $2;",
    (F32, F32),
    F32,
    ordered=False,
    doc="The larger; NaN loses against a number. ISA 9.7.3, max.",
)
minimum = instruction(
    "min.f32 $0, $1, $2;",
    (F32, F32),
    F32,
    ordered=False,
    doc="The smaller; NaN loses against a number. ISA 9.7.3, min.",
)
maximum_or_nan = instruction(
    "max.NaN.f32 $0, $1, $2;",
    (F32, F32),
    F32,
    ordered=False,
    doc="The larger; NaN if one of them is. ISA 9.7.3, max.",
)
fma = instruction(
    "fma.rn.f32 $0, $1, $2, $3;",
    (F32, F32, F32),
    F32,
    ordered=False,
    doc="a * b + c, rounded once. ISA 9.7.3, fma.",
)
multiply = instruction(
    "mul.rn.f32 $0, $1, $2;",
    (F32, F32),
    F32,
    ordered=False,
    doc="a * b, rounded: never fused with a sum that follows, as the compiler does with `*`. ISA 9.7.3, mul.",
)
widen_bf16 = instruction(
    "{ .reg .b32 bits; shl.b32 bits, $1, 16; mov.b32 $0, bits; }",
    (U32,),
    F32,
    ordered=False,
    name="widen_bf16",
    doc="(the 16 bits of a bfloat16): its value.",
)
widen_f16 = instruction(
    "{ .reg .b16 half; cvt.u16.u32 half, $1; cvt.f32.f16 $0, half; }",
    (U32,),
    F32,
    ordered=False,
    name="cvt.f32.f16",
    doc="(the 16 bits of a float16): its value. ISA 9.7.9, cvt.",
)
opaque_i32 = instruction(
    "mov.b32 $0, $1;",
    (I32,),
    I32,
    doc="The same number, of which the compiler then knows nothing: a loop counter that passes through it is not unrolled.",
)
opaque_u32 = instruction(
    "mov.b32 $0, $1;", (U32,), U32, name="opaque_u32", doc="As `opaque_i32`; and not before what is ordered."
)
pack_bf16 = instruction(
    "cvt.rn.bf16x2.f32 $0, $2, $1;",
    (F32, F32),
    U32,
    ordered=False,
    doc="(x, y): both rounded to bfloat16, x in the lower half. ISA 9.7.9, cvt.",
)
pack_f16 = instruction(
    "cvt.rn.f16x2.f32 $0, $2, $1;",
    (F32, F32),
    U32,
    ordered=False,
    doc="(x, y): both rounded to float16, x in the lower half. ISA 9.7.9, cvt.",
)
float_of_bits = instruction("mov.b32 $0, $1;", (U32,), F32, ordered=False, name="mov.b32 to f32", doc="(bits of a float32).")
bits_of_float = instruction("mov.b32 $0, $1;", (F32,), U32, ordered=False, name="mov.b32 of f32", doc="The bits of a float32.")

"""What is right, computed by stored logits from the same bfloat16 inputs, in NumPy or CuPy as the inputs are.

forward    log-sum-exp, target logits and survivors against float64, on a sample of tokens
gradients  gradients against float32 mathematics, as relative Frobenius norms
"""

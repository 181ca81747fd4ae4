"""Wrong temperature, top_k and top_p: (error, argument named, rule, what came, the call's changed arguments)."""

WRONG = [
    (ValueError, "temperature", ">= 0", "-0.1", {"temperature": -0.1}),
    (ValueError, "temperature", "finite", "inf", {"temperature": float("inf")}),
    (ValueError, "temperature", "finite", "nan", {"temperature": float("nan")}),
    (TypeError, "temperature", "number", "str", {"temperature": "hot"}),
    (TypeError, "top_k", "integer", "float", {"top_k": 2.5}),
    (ValueError, "top_k", ">= 1", "0", {"top_k": 0}),
    (ValueError, "top_k", r"2\^63", "9223372036854775808", {"top_k": 2**63}),
    (TypeError, "top_p", "number", "str", {"top_p": "most"}),
    (ValueError, "top_p", "above 0", "0", {"top_p": 0.0}),
    (ValueError, "top_p", "at most 1", "1.01", {"top_p": 1.01}),
    (ValueError, "top_p", "above 0", "nan", {"top_p": float("nan")}),
]

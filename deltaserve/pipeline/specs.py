from deltaserve.pipeline.plan import Plan


def check(plan: Plan):
    return None

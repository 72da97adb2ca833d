"""Do several processes do together what each part promises?"""

"""The blind study: do people prefer our videos?"""
